"""Work over several processes, as ``torchrun`` starts them: each draws or encodes its share.

A candidate is a function of (prompt, seed, index), so the split changes nothing but the time.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import distributed

from dalle_pytorch.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def find_device(wanted: str | torch.device, local_rank: int = 0) -> torch.device:
    """A device by name; "auto" = a GPU where there is one, one for each process, else the CPU.

    Raises:
        ValueError: no name of a device, or one that is not here.
    """
    if wanted == "auto":
        wanted = f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
        reason = str(error).splitlines()[0]
        raise UserError(f"device={wanted} cannot be used here ({reason}); try device=cpu") from error
    return device


class Processes:
    """This process among its siblings; alone where torchrun's variables are not set."""

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo")  # carries results, not gradients: no GPU needed

    def device(self, wanted: str) -> torch.device:
        """A device by name, see ``find_device``; "auto" = this process's GPU where there is one."""
        return find_device(wanted, self.local_rank)

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``count``-th item, beginning at this process's rank."""
        return items[self.rank :: self.count]

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """The function of every item, in order, at every process: each computes its share, and all exchange them.

        All processes must call this with equal items. An item is computed alike wherever it is, so that the results do
        not depend on the number of processes.
        """
        own = [function(item) for item in self.share(items)]
        if self.count == 1:
            return own
        shares: list[Any] = [None] * self.count
        distributed.all_gather_object(shares, own)
        results: list[Any] = [None] * len(items)
        for rank, share in enumerate(shares):
            results[rank :: self.count] = share
        return results

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes at the first one, in rank order; nothing at the others."""
        if self.count == 1:
            return [value]
        values: list[Any] | None = [None] * self.count if self.rank == 0 else None
        distributed.gather_object(value, values)
        return values or []

    def close(self) -> None:
        """Leave the group."""
        if self.count > 1:
            distributed.destroy_process_group()
