"""Checks of what networks are given."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from dalle_pytorch.errors import UserError

ASYNCHRONOUS = ("cuda",)
"""Devices that can check a condition by themselves."""
MAX_PIXEL = 10.0
"""Beyond it pixels are taken for those of 0 to 255."""
IDS = {"text": ("text tokens", "vocabulary"), "image": ("image tokens", "codebook")}


def require(
    holds: Bool[Tensor, ""], message: Callable[[], str], *, wait: bool = True, error: type[ValueError] = ValueError
) -> None:
    """Refuse what does not hold.

    Args:
        holds: the condition, a number on the device of what is checked.
        message: what to say; only called where the condition does not hold.
        wait: read the condition. False = a GPU checks it when it comes to it, and stops the program with the line of
            this assertion: a training step must not wait for its GPU.
        error: what to raise.

    Raises:
        ValueError: it does not hold.
    """
    if not wait and holds.device.type in ASYNCHRONOUS:
        torch._assert_async(holds, "a check of models/checks.py: run it on a CPU to read what is wrong")
    elif not holds:
        raise error(message())


def check_pixels(images: Shaped[Tensor, "..."]) -> None:
    """Refuse images that are no floats in [0, 1], before anything converts them; a GPU is not waited for.

    Values a little outside pass: resampling overshoots, and examples of DALLE-pytorch feed ``torch.randn``.

    Raises:
        UserError: integers, or numbers as far outside as those of 0 to 255; says which.
    """
    if not images.is_floating_point():
        raise UserError(f"images of type {images.dtype} given; they must be floats in [0, 1]: divide by 255")

    def message() -> str:
        if images.isnan().any():
            return "images with NaN given; their pixels must lie in [0, 1]"
        low, high = images.min().item(), images.max().item()
        return f"images with pixels from {low:g} to {high:g} given; they must lie in [0, 1]: divide 0 to 255 by 255"

    require((images.abs() <= MAX_PIXEL).all(), message, wait=False, error=UserError)


def check_ids(ids: Int[Tensor, "..."], size: int, kind: str, *, wait: bool = True) -> None:
    """Refuse ids outside a vocabulary or codebook.

    Args:
        ids: text tokens or image tokens.
        size: number of ids.
        kind: "text" or "image".
        wait: as in ``require``.

    Raises:
        ValueError: names the numbers.
    """
    what, table = IDS[kind]

    def message() -> str:
        return f"{what} span [{int(ids.min())}, {int(ids.max())}], the {table} has ids 0 to {size - 1}"

    if ids.numel():
        require(((ids >= 0) & (ids < size)).all(), message, wait=wait)


def check_same_shape(images: Shaped[Tensor, "..."], targets: Shaped[Tensor, "..."]) -> None:
    """Refuse images that cannot be compared pixel by pixel.

    Raises:
        ValueError: the shapes differ; names both.
    """
    if images.shape != targets.shape:
        raise ValueError(
            f"images of shape {tuple(images.shape)} beside targets of {tuple(targets.shape)}: resize one of them"
        )
