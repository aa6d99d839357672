"""From picture bytes to tensors and back, and random crops; pure functions."""

import io
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from dalle_pytorch.errors import UserError, first_line

# Pillow's own limit is 1 MB, which editors exceed; all text of an image together is still limited to 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # type: ignore[bad-assignment]


def _suffixes() -> frozenset[str]:
    """Suffixes of the formats that Pillow reads, as in ".jpg"; formats that it only identifies are not among them."""
    Image.init()
    stubs = {
        name
        for name, (reader, _) in Image.OPEN.items()
        if isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    }
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, name in known if name in Image.OPEN and name not in stubs)


IMAGE_SUFFIXES = _suffixes()
"""What the name of an image may end with, in lower case, as in ".jpg"."""


def open_rgb(data: bytes, *, name: str) -> Image.Image:
    """Decode a picture to 8-bit RGB, upright, on white.

    The first frame of an animation is taken, the EXIF rotation applied where it can be read, transparency laid on
    white.

    Args:
        data: the encoded picture.
        name: what to call it in an error.

    Returns:
        A Pillow picture of mode "RGB".

    Raises:
        UserError: the bytes are not a whole picture; names it.
    """
    # Damaged files make Pillow's parsers raise whatever they stumble over (TypeError, struct.error, KeyError, ...): no
    # list of types is complete, and whatever is raised here is the fault of the file.
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image: Image.Image = file
            with suppress(Exception):  # broken EXIF is no reason to lose the image
                image = ImageOps.exif_transpose(file)
            return flatten(image)
    except UnidentifiedImageError as error:
        raise UserError(f"picture {name!r} cannot be decoded: no known picture format") from error
    except Exception as error:
        raise UserError(f"picture {name!r} cannot be decoded: {first_line(error)}") from error


def flatten(image: Image.Image) -> Image.Image:
    """Turn a picture of any mode into RGB, with transparency laid on white."""
    if image.mode == "F":
        return image.convert("L").convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.float64) / 257  # 65535 / 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def fit(image: Image.Image, image_size: int) -> Image.Image:
    """Scale the short side to `image_size` and cut the middle square; unchanged if it fits already."""
    if image.size == (image_size, image_size):
        return image
    return ImageOps.fit(image, (image_size, image_size), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """Turn an RGB picture into a float tensor in [0, 1]."""
    array = np.array(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def decode_image(data: bytes, *, image_size: int, name: str) -> Float[Tensor, "3 H W"]:
    """Decode a picture to a square float tensor in [0, 1].

    Args:
        data: the encoded picture, in any mode Pillow reads.
        image_size: side of the result in pixels; another size is scaled (short side) and cut to the middle.
        name: what to call it in an error: the sample's key.

    Returns:
        RGB in [0, 1].

    Raises:
        ValueError: the bytes are not a whole picture; names it.
    """
    return to_tensor(fit(open_rgb(data, name=name), image_size))


def to_pil(image: Float[Tensor, "3 H W"]) -> Image.Image:
    """Turn an RGB tensor into an 8-bit picture; values outside [0, 1] are clipped."""
    array = image.detach().float().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())


def random_crop(image: Float[Tensor, "3 H W"], *, padding: int, generator: torch.Generator) -> Float[Tensor, "3 H W"]:
    """Shift a picture by up to `padding` pixels each way, repeating its border.

    Args:
        image: RGB in [0, 1].
        padding: the largest shift in pixels; 0 returns the picture as it is.
        generator: source of the two shifts.

    Returns:
        A picture of the same size.
    """
    if padding == 0:
        return image
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (padding,) * 4, mode="replicate")[0]
    top, left = torch.randint(0, 2 * padding + 1, (2,), generator=generator).tolist()
    return padded[:, top : top + height, left : left + width]


def random_resized_crop(
    image: Float[Tensor, "3 H W"], *, image_size: int, generator: torch.Generator
) -> Float[Tensor, "3 h w"]:
    """Cut a random square, scale it to a little above `image_size`, cut again.

    Args:
        image: RGB in [0, 1], of any size.
        image_size: side of the result in pixels.
        generator: source of the places and the scale.

    Returns:
        RGB in [0, 1], `image_size` pixels each way.

    Source:
        DALL-E paper, appendix A.2, listing 1 (without its flip, which would make "left" and "right" in
        a caption wrong: see `random_flip`).
    """
    side = min(image.shape[-2:])
    image = _random_square(image, side, generator)
    # 9/8 and 12/8 are the paper's bounds; a small picture is scaled up to the target at least.
    low, high = (max(image_size, min(side, round(image_size * n / 8))) for n in (9, 12))
    scaled = int(torch.randint(low, high + 1, (), generator=generator))
    image = F.interpolate(image[None], size=(scaled, scaled), mode="area")[0]
    return _random_square(image, image_size, generator)


def random_flip(image: Float[Tensor, "3 H W"], *, generator: torch.Generator) -> Float[Tensor, "3 H W"]:
    """Mirror a picture left to right with probability one half."""
    return image.flip(-1) if torch.rand((), generator=generator) < 0.5 else image


def _random_square(image: Float[Tensor, "3 H W"], side: int, generator: torch.Generator) -> Float[Tensor, "3 h w"]:
    height, width = image.shape[-2:]
    top = int(torch.randint(0, height - side + 1, (), generator=generator))
    left = int(torch.randint(0, width - side + 1, (), generator=generator))
    return image[:, top : top + side, left : left + side]
