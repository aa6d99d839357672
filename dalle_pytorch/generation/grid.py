"""Pictures for people: captioned grids and PNG files that carry their settings.

Axes: c channels, H W pixels.
"""

import functools
import io
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.files import write_new
from dalle_pytorch.images import to_pil
from dalle_pytorch.models.image_tokenizer import token_edges

MARGIN = 6  # pixels around every picture
LINE = 18  # pixels for a line of text
SIZE = 13  # of letters
FONTS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf",  # Linux
    "Arial Unicode.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc",  # macOS
    "msyh.ttc", "msgothic.ttc", "malgun.ttf", "seguisym.ttf", "arialuni.ttf",  # Windows
    "NotoEmoji-Regular.ttf", "Symbola.ttf", "unifont.ttf",
)  # fmt: skip
"""Fonts for what Pillow's own lacks, which systems have where Pillow looks for them."""


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class GridRow(NamedTuple):
    """A headed row of pictures with a line under each."""

    title: str
    images: Sequence[Float[Tensor, "c H W"]]
    """In [0, 1], all of one size."""
    labels: Sequence[str]
    """One a picture, or none at all."""


def picture_grid(rows: Sequence[GridRow], *, cell: int = 128) -> Image.Image:
    """Draw rows of pictures on white.

    Args:
        rows: at least one with at least one picture.
        cell: side of a drawn picture in pixels; small pictures are enlarged without smoothing.

    Raises:
        ValueError: nothing to draw, or labels that do not match the pictures.
    """
    if not rows or not any(len(row.images) for row in rows):
        raise UserError("a grid needs at least one picture")
    for row in rows:
        if row.labels and len(row.labels) != len(row.images):
            raise UserError(f"row {row.title!r} has {len(row.images)} pictures and {len(row.labels)} labels")
    columns = max(len(row.images) for row in rows)
    width = columns * (cell + MARGIN) + MARGIN
    texts = [readable(row.title) for row in rows]
    font = default_font()
    titles = [wrapped(text, width - 2 * MARGIN, title_font) for text, title_font in texts]
    labels = [[wrapped(label, cell, font) for label in row.labels] for row in rows]
    heads = [LINE * len(title) for title in titles]
    heights = [
        head + cell + 2 * MARGIN + LINE * max(map(len, under), default=0)
        for head, under in zip(heads, labels, strict=True)
    ]
    canvas = Image.new("RGB", (width, sum(heights) + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    top = MARGIN
    for row, title, (_, title_font), head, under, height in zip(
        rows, titles, texts, heads, labels, heights, strict=True
    ):
        for number, line in enumerate(title):
            pen.text((MARGIN, top + LINE * number), line, fill="black", font=title_font)
        for column, image in enumerate(row.images):
            left = MARGIN + column * (cell + MARGIN)
            picture = to_pil(image).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, top + head))
            pen.rectangle((left - 1, top + head - 1, left + cell, top + head + cell), outline="#dddddd")
            if under:
                for number, line in enumerate(under[column]):
                    pen.text((left, top + head + cell + 2 + LINE * number), line, fill="#555555", font=font)
        top += height
    return canvas


def wrapped(text: str, width: int, font: Font) -> list[str]:
    """Lines of whole words, each no wider than so many pixels; a word that is wider is broken. At least one line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def readable(text: str) -> tuple[str, Font]:
    """A text as it can be drawn, and the font for it: of those at hand the first that has the most of its letters.

    What the font lacks, and what has no shape of its own (control characters), is shown as an escape of Python, such as
    ``\\u732b``.
    """
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    letters = sorted(set(text))
    fonts = fonts_at_hand() if any(not has(default_font(), letter) for letter in letters) else (default_font(),)
    font = max(fonts, key=lambda each: sum(has(each, letter) for letter in letters))  # the first of equals
    return "".join(letter if has(font, letter) else ascii(letter)[1:-1] for letter in text), font


@functools.cache
def default_font() -> Font:
    """Pillow's own font."""
    return ImageFont.load_default(SIZE)


@functools.cache
def fonts_at_hand() -> tuple[Font, ...]:
    """Pillow's own font, and those of FONTS that this system has."""
    found = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, SIZE))
        except OSError:  # not here
            continue
    return default_font(), *found


@functools.cache
def has(font: Font, letter: str) -> bool:
    """Whether a font can show a letter: another shape than that of a code without any."""
    if not letter.isprintable():
        return False
    return letter == " " or _shape(font, letter) != _shape(font, "\U0010fffe")


def _shape(font: Font, letter: str) -> bytes:
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    ImageDraw.Draw(canvas).text((0, 0), letter, fill="white", font=font)
    return canvas.tobytes()


def save_png(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings as JSON in the text field ``dalle_pytorch``.

    Raises:
        FileExistsError: the file is there already.
    """
    info = PngInfo()
    info.add_text("dalle_pytorch", json.dumps(settings, ensure_ascii=True))
    file = io.BytesIO()
    image.save(file, format="PNG", pnginfo=info)
    write_new(path, file.getvalue())


def partial_picture(
    decode: Callable[[Int[Tensor, "b n"]], Float[Tensor, "b c H W"]],
    image_tokens: Int[Tensor, " n"],
    done: int,
    grid: int,
    margin: tuple[int, int] = (0, 0),
) -> Float[Tensor, "c H W"]:
    """The drawn part of a picture, the rest light grey.

    Args:
        decode: image tokens to pictures in [0, 1].
        image_tokens: a whole grid, of which the first ``done`` are drawn.
        done: how many; at least a row.
        grid: token rows = columns.
        margin: of the image tokenizer.
    """
    tokens = image_tokens.clone().view(grid, grid)
    rows = done // grid
    tokens[rows:] = tokens[rows - 1]  # the decoder looks past the edge of what is drawn: let it see more of the same
    picture = decode(tokens.view(1, -1))[0]
    picture[:, token_edges(picture.shape[1], grid, margin)[rows] :] = 0.85
    return picture


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as an endless GIF that rests on the last.

    Raises:
        FileExistsError: the file is there already.
    """
    size = max(frame.width for frame in frames), max(frame.height for frame in frames)
    frames = [
        ImageOps.pad(frame, size, color="white", centering=(0, 0)) if frame.size != size else frame for frame in frames
    ]
    file = io.BytesIO()
    durations = [120] * (len(frames) - 1) + [3000]  # milliseconds
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    write_new(path, file.getvalue())
