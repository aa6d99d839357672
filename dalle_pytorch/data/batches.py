"""Which samples make up which batch: a pure function of seed and epoch, the same for any number of processes."""

import hashlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dalle_pytorch.errors import UserError

Position: TypeAlias = tuple[int, int]
"""Epoch and index of a sample: what a batch sampler yields."""
Batch: TypeAlias = dict[str, Any]
"""``captions`` list[str], ``indices`` Int[b] in the split, ``text_tokens`` Int[b t], ``images`` Float[b 3 H W] or
``image_tokens`` Int[b n]."""


def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The order of an epoch, a permutation of ``range(size)``."""
    digest = hashlib.sha256(f"{seed}/{epoch}/order".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(size, generator=generator).tolist()


class EpochBatches(Sampler[list[Position]]):
    """Batches of one epoch for one of several equal processes; whole batches only.

    Args:
        size: number of samples.
        batch_size: samples of a step over all processes; the global batches do not depend on their number.
        seed: of the order.
        rank: of this process.
        world_size: number of processes; divides ``batch_size``.

    Raises:
        ValueError: fewer samples than a batch, or a batch that the processes cannot share; names the numbers.
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if size < batch_size:
            raise UserError(
                f"the training split has {size} pictures, data.batch_size is {batch_size}; "
                f"set data.batch_size={size} or less"
            )
        if batch_size % world_size:
            raise UserError(f"data.batch_size ({batch_size}) must be a multiple of the {world_size} processes")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.local_size = rank, batch_size // world_size
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[Position]]:
        """This process's share of every batch of ``epoch``, from batch ``first`` on."""
        epoch, order = self.epoch, epoch_order(self.seed, self.epoch, self.size)
        for batch in range(self.first, len(self)):
            start = batch * self.batch_size + self.rank * self.local_size
            yield [(epoch, index) for index in order[start : start + self.local_size]]


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on behind the last batch it gave; Lightning keeps its state in checkpoints.

    The state counts samples of all processes together: it does not depend on their number, nor on that of the workers.
    """

    def __init__(self, dataset: Dataset[Batch], batches: EpochBatches, **settings: Any) -> None:
        super().__init__(dataset, batch_sampler=batches, **settings)
        self.batches, self.epoch, self.samples = batches, 0, 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The rest of the current epoch."""
        size = self.batches.batch_size
        self.batches.epoch, self.batches.first = self.epoch, self.samples // size
        for batch in super().__iter__():
            # Counted before it is given: Lightning never asks for more than the last batch.
            self.samples += size
            if self.samples == len(self) * size:
                self.epoch, self.samples = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, number of samples given in it, and of all samples."""
        return {"epoch": self.epoch, "samples": self.samples, "size": self.batches.size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            ValueError: the epoch was left at a place that is no border of these batches; names both numbers. Or the
                state is a stream's.
        """
        if "samples" not in state:
            raise UserError(
                "the run was trained on a stream, which says nothing of the place in local shards: "
                "resume with the data.path= that it had, or start anew with another out="
            )
        if state["size"] != self.batches.size:
            raise UserError(
                f"the run was trained on {state['size']} samples, data.path= has {self.batches.size}, whose order is "
                "another one: resume with the data that it had, or start anew with another out="
            )
        if state["samples"] % self.batches.batch_size or state["samples"] >= len(self) * self.batches.batch_size:
            raise UserError(
                f"the run was stopped after {state['samples']} samples of an epoch, no whole number of batches "
                f"of data.batch_size={self.batches.batch_size}: resume with the batch size that it had"
            )
        self.epoch, self.samples = state["epoch"], state["samples"]
