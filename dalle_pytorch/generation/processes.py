"""Candidates over several processes, as ``torchrun`` starts them: each draws its share, the first gathers.

A candidate is a function of (prompt, seed, index), so the split changes nothing but the time.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed


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
        raise ValueError(f"device={wanted} cannot be used here ({reason}); try device=cpu") from error
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

    def share(self, indices: Sequence[int]) -> Sequence[int]:
        """Every ``count``-th index, beginning at this process's rank."""
        return indices[self.rank :: self.count]

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
