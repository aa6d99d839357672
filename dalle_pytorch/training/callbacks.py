"""What happens beside the training steps: averaged weights, speed, pictures to look at, checkpoints."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, WeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from dalle_pytorch.data.batches import Batch
from dalle_pytorch.errors import UserError, at_least_one, not_negative
from dalle_pytorch.images import to_pil
from dalle_pytorch.training.base import LitBase
from dalle_pytorch.training.preemption import StopOnSignal
from dalle_pytorch.training.stability import ActivationScales


@dataclass(kw_only=True)
class CallbacksConfig:
    """Averaging, pictures, checkpoints."""

    ema_decay: float = 0.999
    """Decay of the averaged weights, which are validated and kept; 0 = off."""
    picture_every: int = 500
    """A picture at the first validation after so many steps; 0 = none."""
    prompts: list[str] = field(default_factory=list)
    """DALLE: what to draw in the pictures; empty = the first captions of the validation split."""
    checkpoint_every: int = 500
    """Steps between checkpoints to resume from."""
    keep_last: int = 2
    """How many of these are kept; with one alone a damaged file would be the end of the run."""
    activation_scales: bool = False
    """Log the root mean square of every transformer block's output."""
    keep: str = "best"
    """Which weights the run ends with: "best" (on the validation split) or "last"."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must lie in [0, 1), 0 = off; got {self.ema_decay}")
        not_negative(self, "picture_every")
        at_least_one(self, "checkpoint_every", "keep_last")
        if self.keep not in ("best", "last"):
            raise UserError(f'keep must be "best" or "last", got {self.keep!r}')


def make_callbacks(
    config: CallbacksConfig, out: Path, lit: LitBase[Any], *, validates: bool, sharded: bool = False
) -> list[Callback]:
    """The callbacks of a run, in the order they must have.

    Raises:
        ValueError: averaged weights are asked for, and weights are sharded.
    """
    if sharded and config.ema_decay:
        raise UserError("sharded weights cannot be averaged: set callbacks.ema_decay=0")
    callbacks: list[Callback] = [Throughput()]
    if config.activation_scales:
        callbacks.append(ActivationScales())
    if config.picture_every and not sharded:  # one process alone draws, and has not all weights then
        callbacks.append(SamplePictures(config.picture_every, out / "pictures"))  # before the weights go back
    if config.ema_decay:
        callbacks.append(ema(config.ema_decay))
    common: dict[str, Any] = {
        "dirpath": out / "checkpoints",
        "auto_insert_metric_name": False,
        "enable_version_counter": False,
        "save_on_train_epoch_end": False,
    }
    if validates:
        best = {"monitor": lit.monitor, "mode": lit.monitor_mode, "filename": "best"}
        callbacks.append(ModelCheckpoint(**common, **best))
    newest = {"monitor": "step", "mode": "max", "save_top_k": config.keep_last, "filename": "step_{step:08d}"}
    callbacks.append(StepCheckpoint(**common, **newest, every_n_train_steps=config.checkpoint_every))
    callbacks.append(StopOnSignal(out / "checkpoints", config.keep_last))
    return callbacks


class StepCheckpoint(ModelCheckpoint):
    """Checkpoints to resume from.

    Where a validation is due at the same step it comes first: a resumed run does not repeat it, and the checkpoint has
    to know its score.
    """

    waits = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, or wait for the validation."""
        every = trainer.val_check_batch
        due = trainer.check_val_every_n_epoch is None and isinstance(every, int) and trainer.enable_validation
        if due and (trainer.fit_loop.total_batch_idx + 1) % every == 0:
            self.waits = trainer.global_step % self._every_n_train_steps == 0
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what waited."""
        if self.waits:
            self.waits = False
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def ema(decay: float) -> WeightAveraging:
    """Exponential moving average of the weights; validated, shown and kept in place of the last ones.

    The decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that short runs forget their random start
    (as in TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        n = int(num_averaged)
        # The sharing of weights is kept: deepcopy has seen to it.
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
    """Pictures per second in the progress bar and the logs, reading included, validation not."""

    def __init__(self) -> None:
        self.started = 0.0
        self.durations: deque[float] = deque(maxlen=50)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start it again: validation is not training."""
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Average over the last 50 steps."""
        now = time.perf_counter()
        self.durations.append(now - self.started)
        self.started = now
        size = len(batch["captions"]) * trainer.world_size
        rate = size * len(self.durations) / sum(self.durations)
        pl_module.log("train/samples_per_second", rate, prog_bar=True, batch_size=size)


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
