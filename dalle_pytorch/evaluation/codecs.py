"""The same pictures as JPEG and WebP files of the same size, beside what an image tokenizer makes of them.

Axes: b pictures, c channels, H W pixels.
"""

import io
from typing import NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.shares import in_parts
from dalle_pytorch.images import to_pil, to_tensor

CODECS = ("JPEG", "WEBP")
SCALES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
"""Sides at which a picture is tried: below some size a smaller picture of better quality looks better."""
QUALITIES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90)


class Coded(NamedTuple):
    """Pictures after a codec."""

    images: Float[Tensor, "b 3 H W"]
    file_bytes: Float[Tensor, " b"]
    """Size of each file, its header included."""


def at_bytes(images: Float[Tensor, "b 3 H W"], codec: str, budget: float | int) -> Coded:
    """Every picture in the best file of at most so many bytes, or in the smallest where none is so small.

    Best is the least squared error, over sizes of the picture and quality settings; smaller pictures are enlarged.

    Args:
        images: RGB in [0, 1].
        codec: "JPEG" or "WEBP".
        budget: bytes a file.

    Raises:
        ValueError: an unknown codec, or one that this Pillow lacks.
    """
    if codec not in CODECS:
        raise UserError(f"codec must be one of {', '.join(CODECS)}, got {codec!r}")
    Image.init()
    if codec not in Image.SAVE:
        raise UserError(f"this Pillow writes no {codec}; install one that does")
    coded = in_parts(lambda image: _best(to_pil(image), image, codec, budget), list(images))
    sizes = torch.tensor([size for _, size in coded], dtype=torch.float64)
    return Coded(torch.stack([image for image, _ in coded]), sizes)


def _best(
    picture: Image.Image, target: Float[Tensor, "3 H W"], codec: str, budget: float | int
) -> tuple[Float[Tensor, "3 H W"], int]:
    best, least, smallest = None, float("inf"), None
    for scale in SCALES:
        side = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        small = picture if side == picture.size else picture.resize(side, Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            data = _encode(small, codec, quality)
            if smallest is None or len(data) < len(smallest):
                smallest = data
            if len(data) > budget:
                break  # better qualities take more
            decoded = _decode(data, picture.size)
            error = (decoded - target.cpu()).square().mean().item()
            if error < least:
                best, least = (decoded, len(data)), error
    if best is None:
        assert smallest is not None
        return _decode(smallest, picture.size), len(smallest)
    return best


def _encode(picture: Image.Image, codec: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    options = {"optimize": True} if codec == "JPEG" else {"method": 4}
    picture.save(buffer, format=codec, quality=quality, **options)
    return buffer.getvalue()


def _decode(data: bytes, size: tuple[int, int]) -> Float[Tensor, "3 H W"]:
    with Image.open(io.BytesIO(data)) as file:
        picture = file.convert("RGB")
    return to_tensor(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC))
