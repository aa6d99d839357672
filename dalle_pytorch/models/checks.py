"""Checks of what networks are given."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

ASYNCHRONOUS = ("cuda",)
"""Devices that can check a condition by themselves."""
IDS = {"text": ("text tokens", "vocabulary"), "image": ("image tokens", "codebook")}


def require(holds: Bool[Tensor, ""], message: Callable[[], str], *, wait: bool = True) -> None:
    """Refuse what does not hold.

    Args:
        holds: the condition, a number on the device of what is checked.
        message: what to say; only called where the condition does not hold.
        wait: read the condition. False = a GPU checks it when it comes to it, and stops the program with the line of
            this assertion: a training step must not wait for its GPU.

    Raises:
        ValueError: it does not hold.
    """
    if not wait and holds.device.type in ASYNCHRONOUS:
        torch._assert_async(holds, "a check of models/checks.py: run it on a CPU to read what is wrong")
    elif not holds:
        raise ValueError(message())


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
