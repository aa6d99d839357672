"""The rainbow benchmark: 9,216 drawn shapes, one for every choice of six factors, with captions that name them.

Source: the factors, their sizes and the colours are those of DALLE-pytorch's ``examples/rainbow_dalle.ipynb``, whose
DALLE gets 49 % of the held-out pictures exactly right. We deviate in the drawing: edges are smooth (theirs are not),
outlines 2 pixels wide (theirs 1), textures and rainbow repeat every 4, 8 or 16 pixels over the whole picture (theirs
are error diffusion, which depends on the shape, and a colour per row), so that a tokenizer with 8 x 8 pixels per token
meets the same patch again. Sizes have plainer names. Theirs draws the training pictures with replacement (so 26 % of
them, and their test set is the other 74 %); ours are 30 % distinct ones.
"""

import hashlib
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw

from dalle_pytorch.data.shards import ShardWriter
from dalle_pytorch.errors import UserError

IMAGE_SIZE = 32
TRAIN_FRACTION = 0.3
_FINE = 8  # drawn at 8 times the size, then averaged: smooth edges
_STROKE = 2.0  # width of an outline, pixels

Array = np.ndarray

# Share of half the picture's side that the shape's outer circle takes.
SIZES = {"small": 0.4, "medium": 0.6, "large": 0.8, "huge": 1.0}
FILLS = {"": False, "filled": True}
# CSS colours; "rainbow" has no single one.
_RAINBOW = {
    "red": (255, 0, 0),
    "orange": (255, 165, 0),
    "yellow": (255, 255, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "indigo": (75, 0, 130),
    "violet": (238, 130, 238),
}
COLOURS: dict[str, tuple[int, int, int] | None] = {
    **_RAINBOW,
    "cyan": (0, 255, 255),
    "brown": (139, 69, 19),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "rainbow": None,
}
# How much white is mixed in, repeated over the picture from its corner.
TEXTURES: dict[str, list[list[float]]] = {
    "": [[0.0]],
    "shaded": [[0.3 + 0.3 * math.cos(math.tau * (x + 0.5) / 8) for x in range(8)]],  # soft stripes
    "halftone": [[0.5, 0.5, 0.0, 0.0]] * 2 + [[0.0, 0.0, 0.5, 0.5]] * 2,  # a board of 2 x 2 dots
}
# Counter-clockwise quarter turns, for numpy.rot90.
ROTATIONS = {"": 0, "rotated clockwise": 3, "rotated twice": 2, "rotated counterclockwise": 1}


def _arc(x: float, radius: float, start: float, end: float) -> Float[Array, "corner 2"]:
    angles = np.radians(np.linspace(start, end, 65))
    return np.stack([x + radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _ring(radii: list[float]) -> Float[Array, "corner 2"]:
    """Corners at equal angles from the top, at the radii given."""
    angles = np.linspace(0, math.tau, len(radii), endpoint=False)
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1) * np.array(radii)[:, None]


def _box(width: float, height: float) -> Float[Array, "corner 2"]:
    return np.array([(-width, -height), (width, -height), (width, height), (-width, height)])


# Corners in a square from -1 to 1, y downwards.
SHAPES: dict[str, Array] = {
    "circle": _arc(0.0, 1.0, 0.0, 360.0),
    "triangle": _ring([1.0] * 3),
    "square": _box(0.9, 0.9),
    "rhombus": _ring([1.0, 0.5] * 2),
    "rectangle": _box(0.9, 0.5),
    "star": _ring([1.0, 1 / math.sqrt(3)] * 6),  # two triangles laid over one another
    "hexagon": _ring([1.0] * 6),
    "crescent": np.concatenate([_arc(0.0, 1.0, -90.0, 90.0), _arc(-math.sqrt(3), 2.0, 30.0, -30.0)]),
}
# The mirrors that leave a shape as it is: left to right, top to bottom, about the diagonal. Pillow draws half a
# fine pixel off, and the average with the mirror images takes that away; else a turned circle would differ a little.
_MIRRORS = {
    "circle": "xyd",
    "triangle": "x",
    "square": "xyd",
    "rhombus": "xy",
    "rectangle": "xy",
    "star": "xy",
    "hexagon": "xy",
    "crescent": "y",
}


class Drawing(NamedTuple):
    """The six factors of one picture, by name; "" is the plain choice that a caption leaves out."""

    size: str
    fill: str
    texture: str
    colour: str
    shape: str
    rotation: str

    @property
    def caption(self) -> str:
        """As in "small shaded orange circle rotated clockwise"."""
        return " ".join(word for word in self if word)


def all_drawings() -> list[Drawing]:
    """Return all 9,216 choices, in a fixed order."""
    factors = (SIZES, FILLS, TEXTURES, COLOURS, SHAPES, ROTATIONS)
    return [Drawing(*names) for names in itertools.product(*factors)]


def draw(drawing: Drawing) -> Image.Image:
    """Draw a picture on white, 32 x 32 pixels.

    A rotation turns the shape alone; texture and rainbow stay where they are. So a circle looks the same in all four
    rotations, a rectangle in two: 5,184 of the 9,216 pictures differ.
    """
    cover = turned(drawing)
    white = _tiled(np.array(TEXTURES[drawing.texture]))
    colour = _colour_field(drawing.colour)
    ink = colour + (1 - colour) * white[..., None]
    pixels = 1 - cover[..., None] * (1 - ink)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def turned(drawing: Drawing) -> Float[Array, "32 32"]:
    """How much of each pixel the shape covers after its rotation, in [0, 1]."""
    return np.rot90(_cover(drawing.size, drawing.fill, drawing.shape), ROTATIONS[drawing.rotation])


def train_drawings(drawings: Sequence[Drawing], share: float = TRAIN_FRACTION) -> set[Drawing]:
    """Choose the share to train on: those with the smallest SHA-256 of their captions."""
    ranked = sorted(drawings, key=lambda d: hashlib.sha256(d.caption.encode()).digest())
    return set(ranked[: round(share * len(ranked))])


def pack_rainbow(out: Path, *, train_fraction: float = TRAIN_FRACTION, samples_per_shard: int = 1000) -> dict[str, Any]:
    """Write the rainbow shards: splits "train" and "test".

    Args:
        out: shard folder to write; absent or empty.
        train_fraction: fraction of the pictures in "train", in (0, 1).
        samples_per_shard: the most samples in one tar.

    Returns:
        The index written.
    """
    if not 0 < train_fraction < 1:
        raise UserError(f"train_fraction must lie between 0 and 1, got {train_fraction}")
    writer = ShardWriter(
        out,
        name="rainbow",
        image_size=IMAGE_SIZE,
        samples_per_shard=samples_per_shard,
        source={"train_share": train_fraction},
    )
    with writer:
        drawings = all_drawings()
        train = train_drawings(drawings, train_fraction)
        for drawing in drawings:
            out_bytes = io.BytesIO()
            draw(drawing).save(out_bytes, "png")
            writer.write(
                "train" if drawing in train else "test",
                drawing.caption.replace(" ", "-"),
                out_bytes.getvalue(),
                "png",
                {
                    "captions": [drawing.caption],
                    "concept": drawing.caption,
                    "factors": drawing._asdict(),
                },
            )
    return writer.index()


_covers: dict[tuple[str, str, str], Array] = {}  # 64 small masks, drawn once


def _cover(size: str, fill: str, shape: str) -> Float[Array, "32 32"]:
    """How much of each pixel the shape covers, in [0, 1]."""
    if (size, fill, shape) not in _covers:
        half = IMAGE_SIZE * _FINE / 2
        # A hair inside the border, or the corners of the largest shapes would be cut.
        radius = SIZES[size] * (half - _FINE)
        middle = half - 0.5  # Pillow counts from the middle of the first pixel
        corners = [(x, y) for x, y in (middle + radius * SHAPES[shape]).tolist()]
        mask = Image.new("L", (IMAGE_SIZE * _FINE,) * 2)
        ImageDraw.Draw(mask).polygon(corners, fill=255)
        fine = np.asarray(mask)
        if not FILLS[fill]:
            stroke = Image.new("L", mask.size)
            # Twice the width along the border, cut to the inside.
            pen = ImageDraw.Draw(stroke)
            width = round(2 * _STROKE * _FINE)
            pen.line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
            fine = np.minimum(fine, np.asarray(stroke))
        cover = fine.reshape(IMAGE_SIZE, _FINE, IMAGE_SIZE, _FINE).mean(axis=(1, 3)) / 255
        for mirror in _MIRRORS[shape]:
            mirrored = {"x": cover[:, ::-1], "y": cover[::-1], "d": cover.T}[mirror]
            cover = (cover + mirrored) / 2
        _covers[size, fill, shape] = cover
    return _covers[size, fill, shape]


def _colour_field(name: str) -> Float[Array, "32 32 3"]:
    """The colour of each pixel; the rainbow runs down twice, so that the smallest shapes show most of it."""
    flat = COLOURS[name]
    if flat is not None:
        return np.broadcast_to(np.array(flat) / 255, (IMAGE_SIZE, IMAGE_SIZE, 3))
    stops = np.array(list(_RAINBOW.values())) / 255
    where = np.linspace(0, len(stops) - 1, IMAGE_SIZE // 2)
    rows = [np.interp(where, range(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.broadcast_to(_tiled(np.stack(rows, axis=-1)[:, None]), (IMAGE_SIZE, IMAGE_SIZE, 3))


def _tiled(pattern: Array) -> Array:
    """Repeat a pattern over the picture from its top left corner."""
    repeats = (IMAGE_SIZE // pattern.shape[0], IMAGE_SIZE // pattern.shape[1])
    return np.tile(pattern, repeats + (1,) * (pattern.ndim - 2))
