"""Draws SVGs."""

import io
from types import ModuleType

from PIL import Image

from dalle_pytorch.errors import UserError
from dalle_pytorch.images import flatten

_WEBP = {"lossless": True, "quality": 100, "method": 6}  # slowest and smallest; exact pixels


def render(svg: str, image_size: int) -> Image.Image:
    """Draw an SVG on a white square, whole, in the middle.

    Args:
        svg: a document with width and height.
        image_size: side of the picture in pixels.

    Returns:
        An RGB picture.
    """
    width, height = (float(part) for part in svg.split('viewBox="0 0 ')[1].split('"')[0].split())
    # System fonts are left out: no icon has text, and they differ between machines.
    png = resvg().svg_to_bytes(
        svg_string=svg,
        width=image_size if width >= height else None,
        height=image_size if height > width else None,
        skip_system_fonts=True,
    )
    drawn = flatten(Image.open(io.BytesIO(bytes(png))))
    image = Image.new("RGB", (image_size, image_size), "white")
    image.paste(drawn, ((image_size - drawn.width) // 2, (image_size - drawn.height) // 2))
    return image


def resvg() -> ModuleType:
    """Import the renderer, which nothing else needs."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("drawing the emoji needs the renderer: pip install resvg-py") from error
    return resvg_py


def encode_webp(image: Image.Image) -> bytes:
    """Encode a picture without loss."""
    out = io.BytesIO()
    image.save(out, "webp", **_WEBP)
    return out.getvalue()
