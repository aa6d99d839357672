"""What happens beside the training steps: averaged weights, speed, pictures to look at, checkpoints."""

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from lightning_fabric.utilities.throughput import get_available_flops
from pytorch_lightning.callbacks import Callback, Checkpoint, ModelCheckpoint, WeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dalle_pytorch.config import build
from dalle_pytorch.data.batches import Batch
from dalle_pytorch.errors import UserError
from dalle_pytorch.images import to_pil
from dalle_pytorch.training.base import LitBase
from dalle_pytorch.training.config import CallbacksConfig
from dalle_pytorch.training.preemption import StopOnSignal
from dalle_pytorch.training.resume import checkpoint_path, prune
from dalle_pytorch.training.stability import ActivationScales


def make_callbacks(
    config: CallbacksConfig, out: Path, lit: LitBase[Any], *, validates: bool, sharded: bool = False, count: bool = True
) -> list[Callback]:
    """The callbacks of a run, in the order they must have.

    Args:
        config: which.
        out: folder of the run.
        lit: says which metric the best model is chosen by.
        validates: whether there is something to validate on.
        sharded: whether weights are spread over processes.
        count: measure the arithmetic of a step; not where blocks are compiled.

    Raises:
        UserError: averaged weights are asked for, and weights are sharded.
    """
    if sharded and config.ema_decay:
        raise UserError("sharded weights cannot be averaged: set callbacks.ema_decay=0")
    callbacks: list[Callback] = [Throughput(count=count)]
    if config.activation_scales:
        callbacks.append(ActivationScales())
    if config.picture_every and not sharded:  # one process alone draws, and has not all weights then
        callbacks.append(SamplePictures(config.picture_every, out / "pictures"))  # before the weights go back
    if config.ema_decay:
        callbacks.append(ema(config.ema_decay))
    callbacks += [build(section, f"callbacks.custom.{name}") for name, section in config.custom.items()]
    callbacks.append(ValidateAtEnd())
    folder = out / "checkpoints"
    if validates:
        callbacks.append(
            ModelCheckpoint(
                folder,
                "best",
                monitor=lit.monitor,
                mode=lit.monitor_mode,
                auto_insert_metric_name=False,
                enable_version_counter=False,
                save_on_train_epoch_end=False,
            )
        )
    callbacks.append(StepCheckpoint(folder, config.checkpoint_every, config.keep_last, config.keep_every))
    callbacks.append(StopOnSignal(folder, config.keep_last, config.keep_every))
    return callbacks


def is_last_step(trainer: pl.Trainer) -> bool:
    """Whether the batch that just ended is the last of the training, as far as steps, epochs and time limits tell."""
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return trainer.should_stop or trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)


class ValidateAtEnd(Callback):
    """A validation after the last step, whatever trainer.val_check_interval divides."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask Lightning to stop, before which it validates."""
        if is_last_step(trainer):
            trainer.should_stop = True


class StepCheckpoint(Checkpoint):
    """Checkpoints to resume from: between two optimiser steps, every so many of them and after the last.

    Where a validation is due at the same step it comes first: a resumed run does not repeat it, and the checkpoint has
    to know its score.

    Args:
        folder: where they are.
        every: steps.
        keep_last: how many are kept.
        keep_every: those of every so many steps are kept for good; 0 = none.
    """

    def __init__(self, folder: Path, every: int, keep_last: int, keep_every: int) -> None:
        self.folder, self.every, self.keep_last, self.keep_every = folder, every, keep_last, keep_every
        self.step, self.waits = 0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Where the training begins or goes on."""
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, or wait for the validation."""
        if trainer.global_step == self.step:  # gradients are being accumulated
            return
        self.step = trainer.global_step
        if self.step % self.every == 0 or is_last_step(trainer):
            loop = trainer.fit_loop
            assert loop._data_fetcher is not None
            if trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
                self.waits = True
            else:
                self.save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what waited."""
        if self.waits:
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write the checkpoint of this step, and remove those that are too old."""
        self.waits = False
        trainer.save_checkpoint(checkpoint_path(self.folder, self.step))
        if trainer.is_global_zero:
            prune(self.folder, self.keep_last, self.keep_every)


def ema(decay: float) -> WeightAveraging:
    """Exponential moving average of the weights; validated, shown and kept in place of the last ones.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that short runs forget their random start
    (as in TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        # deepcopy preserves tied weights
        torch._foreach_lerp_(list(averaged), list(current), 1 - min(decay, (1 + n) / (10 + n)))

    return DeviceWeightAveraging(use_buffers=False, multi_avg_fn=torch.no_grad()(update))


class DeviceWeightAveraging(WeightAveraging):
    """Lightning's averaging, with the averages where the weights are: Lightning copies before it moves the model."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move them."""
        super().on_train_start(trainer, pl_module)
        if self._average_model is not None:
            self._average_model.to(pl_module.device)


class Throughput(Callback):
    """Speed in the progress bar and the logs, reading included, validation not.

    ``train/samples_per_second`` is that of all processes, ``train/tflops_per_second`` that of one, and ``train/mfu``
    (model FLOPs utilisation) its part of what the GPU can do, where Lightning knows that. Lightning's ThroughputMonitor
    would log the batches of a validation as steps of the training.

    Args:
        count: measure the arithmetic of a step: three times that of the first forward pass (Chowdhery et al. 2022,
            appendix B), so that recomputed activations do not count; a frozen image tokenizer counts as if trained.
    """

    def __init__(self, *, count: bool = True) -> None:
        self.started = 0.0
        self.durations: deque[float] = deque(maxlen=50)
        self.counter = FlopCounterMode(display=False) if count else None
        self.counting = False
        self.flops = 0.0
        self.peak: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()
        half = "16" in str(trainer.precision)
        self.peak = get_available_flops(trainer.strategy.root_device, torch.bfloat16 if half else torch.float32)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count in the first batch."""
        if self.counter is not None and not self.flops:
            self.counter.__enter__()
            self.counting = True

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """The forward pass has ended."""
        self.stop_counting()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """It ended otherwise."""
        self.stop_counting()

    def stop_counting(self) -> None:
        """Take the count."""
        if self.counting and self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.counting, self.flops = False, max(1.0, 3.0 * self.counter.get_total_flops())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock again: validation is not training."""
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Average over the last 50 batches."""
        now = time.perf_counter()
        self.durations.append(now - self.started)
        self.started = now
        size = len(batch["captions"]) * trainer.world_size
        rate = len(self.durations) / sum(self.durations)
        pl_module.log("train/samples_per_second", rate * size, prog_bar=True, batch_size=size)
        if self.flops:
            pl_module.log("train/tflops_per_second", rate * self.flops / 1e12, batch_size=size)
            if self.peak:
                pl_module.log("train/mfu", rate * self.flops / self.peak, prog_bar=True, batch_size=size)


class SamplePictures(Callback):
    """Writes ``pictures/step_*.png`` and hands the same picture to the loggers.

    Args:
        every: steps; the picture comes with the first validation after so many, of the weights that are validated.
        folder: where the files go.
    """

    def __init__(self, every: int, folder: Path) -> None:
        self.every, self.folder = every, folder
        self.next_step = 0
        self.batch: Batch | None = None

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep the first batch."""
        if batch_idx == 0:
            self.batch = batch

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw, if it is time."""
        step = trainer.global_step
        if trainer.sanity_checking or self.batch is None or step < self.next_step:
            return
        self.next_step = step - step % self.every + self.every
        if not trainer.is_global_zero or not isinstance(pl_module, LitBase):
            return
        picture = pl_module.pictures(self.batch).float().cpu().clamp(0, 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        to_pil(picture).save(self.folder / f"step_{step:06d}.png")
        for logger in trainer.loggers:
            log_picture(logger, picture, step)

    def state_dict(self) -> dict[str, Any]:
        """When the next picture is due."""
        return {"next_step": self.next_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.next_step = state_dict["next_step"]


def log_picture(logger: Any, picture: Float[Tensor, "3 H W"], step: int) -> None:
    """Hand a picture in [0, 1] to a logger that takes pictures; others are left alone."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image("pictures", picture, step)
    elif isinstance(logger, WandbLogger):
        logger.log_image("pictures", [to_pil(picture)], step=step)
