"""Which samples make up which batch: a pure function of seed and epoch, the same for any number of processes."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from dalle_pytorch.errors import UserError

log = logging.getLogger(__name__)

Position: TypeAlias = tuple[int, int]
"""Epoch and index of a sample: what a batch sampler yields."""
Batch: TypeAlias = dict[str, Any]
"""``captions`` list[str], ``indices`` Int[b] in the split, ``text_tokens`` Int[b t], ``images`` Float[b 3 H W] or
``image_tokens`` Int[b n]. Where a step has several micro-batches, also those of `with_steps`."""


def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The order of an epoch, a permutation of ``range(size)``."""
    digest = hashlib.sha256(f"{seed}/{epoch}/order".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(size, generator=generator).tolist()


def divide(batch_size: int, world_size: int, micro_batch_size: int | None = None) -> tuple[int, int]:
    """How the processes share a step: images of a micro-batch, and micro-batches of a step in each process.

    Args:
        batch_size: images of a step over all processes.
        world_size: number of processes.
        micro_batch_size: images that a process holds at a time; None = its whole share of the step.

    Raises:
        UserError: they do not divide; names the settings and numbers.
    """
    if batch_size % world_size:
        raise UserError(f"data.batch_size ({batch_size}) must be a multiple of the {world_size} processes")
    share = batch_size // world_size
    micro = micro_batch_size or share
    if share % micro:
        raise UserError(
            f"data.micro_batch_size ({micro}) must divide the {share} images of each process: data.batch_size "
            f"({batch_size}) over {world_size} processes"
        )
    return micro, share // micro


class EpochBatches(Sampler[list[Position]]):
    """Micro-batches of one epoch for one of several equal processes; whole steps only.

    Step s is ``order[s * batch_size : (s + 1) * batch_size]``, whatever the number of processes and the size of a
    micro-batch: process r takes the r-th of equal slices, and cuts it into micro-batches in order.

    Args:
        size: number of samples.
        batch_size: samples of a step over all processes and micro-batches.
        seed: of the order.
        rank: of this process.
        world_size: number of processes; divides ``batch_size``.
        micro_batch_size: samples of a micro-batch, a divisor of the share of a process; None = the whole share.

    Attributes:
        accumulate: micro-batches of a step.
        steps: steps of an epoch.
        epoch: the epoch to give.
        first: its first step to give.

    Raises:
        UserError: fewer samples than a step, or a step that cannot be shared; names the numbers.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
    ) -> None:
        if size < batch_size:
            raise UserError(
                f"the training split has {size} images, data.batch_size is {batch_size}; "
                f"set data.batch_size={size} or less"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.micro_batch_size, self.accumulate = divide(batch_size, world_size, micro_batch_size)
        self.steps = size // batch_size
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        """Micro-batches of a whole epoch."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Position]]:
        """This process's micro-batches of ``epoch``, from step ``first`` on."""
        epoch, order = self.epoch, epoch_order(self.seed, self.epoch, self.size)
        share = self.batch_size // self.world_size
        for step in range(self.first, self.steps):
            own = order[step * self.batch_size + self.rank * share :][:share]
            for start in range(0, share, self.micro_batch_size):
                yield [(epoch, index) for index in own[start : start + self.micro_batch_size]]


def with_steps(batches: Iterable[Batch], accumulate: int) -> Iterator[Batch]:
    """Tell each micro-batch about its step: what normalises over a step, or looks for other captions, needs all of it.

    Args:
        batches: whole steps, which are read ahead one at a time.
        accumulate: micro-batches of a step; nothing is added where it is 1.

    Yields:
        The micro-batches, with ``step_captions``, all captions of this process's share of the step, and
        ``step_text_tokens`` Int[share t] where there are text tokens.
    """
    if accumulate == 1:
        yield from batches
        return
    batches = iter(batches)
    while step := list(islice(batches, accumulate)):
        whole: Batch = {"step_captions": [caption for batch in step for caption in batch["captions"]]}
        if "text_tokens" in step[0]:
            whole["step_text_tokens"] = torch.cat([batch["text_tokens"] for batch in step])
        for batch in step:
            yield {**batch, **whole}


class ResumableLoader(DataLoader[Any]):
    """A loader that goes on behind the last step it gave; Lightning keeps its state in checkpoints.

    The state counts samples of all processes together: it depends neither on their number, nor on that of the workers,
    nor on the size of a micro-batch.

    Args:
        dataset: maps positions to samples.
        batches: which samples.
        data_sha256: tells these data from others, see `ShardDataset.sha256`.
        settings: of the DataLoader.
    """

    def __init__(
        self, dataset: Dataset[Batch], batches: EpochBatches, *, data_sha256: str | None = None, **settings: Any
    ) -> None:
        super().__init__(dataset, batch_sampler=batches, **settings)
        self.batches, self.data_sha256 = batches, data_sha256
        self.epoch, self.samples = 0, 0

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step."""
        return self.batches.accumulate

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The rest of the current epoch; a step that was left in the middle is given anew."""
        batches = self.batches
        batches.epoch, batches.first = self.epoch, self.samples // batches.batch_size
        self.samples = batches.first * batches.batch_size
        for batch in with_steps(super().__iter__(), batches.accumulate):
            # Counted before it is given: Lightning never asks for more than the last batch.
            self.samples += batches.micro_batch_size * batches.world_size
            if self.samples == batches.steps * batches.batch_size:
                self.epoch, self.samples = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, number of samples given in it, number of all samples, and which data they are."""
        return {"epoch": self.epoch, "samples": self.samples, "size": self.batches.size, "data": self.data_sha256}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken. Other data of the same size are named in the log.

        Raises:
            UserError: the epoch was left at a place that is no border of these steps; names both numbers. Or the
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
        size = self.batches.batch_size
        if state["samples"] % size or state["samples"] >= self.batches.steps * size:
            raise UserError(
                f"the run was stopped after {state['samples']} samples of an epoch, no whole number of steps "
                f"of data.batch_size={size}: resume with the batch size that it had"
            )
        if state.get("data", self.data_sha256) != self.data_sha256 and self.batches.rank == 0:
            log.warning(
                "data.path= holds other data than the run was trained on: as many samples, but other checksums of the "
                "shards; training goes on with them"
            )
        self.epoch, self.samples = state["epoch"], state["samples"]
