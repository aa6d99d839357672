"""Pictures for people: captioned grids and PNG files that carry their settings.

Axes: c channels, H W pixels.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from dalle_pytorch.data.images import to_pil
from dalle_pytorch.models.image_tokenizer import token_edges

MARGIN = 6  # pixels around every picture
LINE = 18  # pixels for a line of text


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
        raise ValueError("a grid needs at least one picture")
    for row in rows:
        if row.labels and len(row.labels) != len(row.images):
            raise ValueError(f"row {row.title!r} has {len(row.images)} pictures and {len(row.labels)} labels")
    font = ImageFont.load_default(13)
    columns = max(len(row.images) for row in rows)
    heights = [LINE + cell + 2 * MARGIN + (LINE if row.labels else 0) for row in rows]
    canvas = Image.new("RGB", (columns * (cell + MARGIN) + MARGIN, sum(heights) + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        pen.text((MARGIN, top), row.title, fill="black", font=font)
        for column, image in enumerate(row.images):
            left = MARGIN + column * (cell + MARGIN)
            picture = to_pil(image).resize((cell, cell), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, top + LINE))
            pen.rectangle((left - 1, top + LINE - 1, left + cell, top + LINE + cell), outline="#dddddd")
            if row.labels:
                pen.text((left, top + LINE + cell + 2), row.labels[column], fill="#555555", font=font)
        top += height
    return canvas


def save_png(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings as JSON in the text field ``dalle_pytorch``.

    Raises:
        FileExistsError: the file is there already.
    """
    info = PngInfo()
    info.add_text("dalle_pytorch", json.dumps(settings, ensure_ascii=True))
    with path.open("xb") as file:
        image.save(file, format="PNG", pnginfo=info)


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
    with path.open("xb") as file:
        durations = [120] * (len(frames) - 1) + [3000]  # milliseconds
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
