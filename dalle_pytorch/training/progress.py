"""The progress bar: one for the whole training, so that its ETA is the training's."""

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

REFRESH_SECONDS = {True: 0.5, False: 30.0}  # on a terminal; in a log file, where every refresh is a line


class StepBar(ProgressBar):
    """Optimiser steps out of all, with ETA and every metric that is logged with ``prog_bar``."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm[Any] | None = None
        self.enabled = True

    def disable(self) -> None:
        """Called by Lightning in all processes but the first."""
        self.enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step that the run continues from."""
        is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=int(trainer.estimated_stepping_batches),
            initial=trainer.global_step,
            desc="training",
            unit="step",
            disable=not self.enabled,
            dynamic_ncols=is_terminal,
            mininterval=REFRESH_SECONDS[is_terminal],
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance; a step of several accumulated batches counts once."""
        if self.bar is not None and (steps := trainer.global_step - self.bar.n):
            self.bar.set_postfix_str(self.metrics(trainer), refresh=False)
            self.bar.update(steps)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar with the last metrics."""
        if self.bar is not None:
            self.bar.set_postfix_str(self.metrics(trainer))
            self.bar.close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without tearing the bar."""
        if self.enabled:
            tqdm.write(" ".join(str(arg) for arg in args))

    @staticmethod
    def metrics(trainer: pl.Trainer) -> str:
        """The metrics in short."""
        values = trainer.progress_bar_metrics
        names = {"train/samples_per_second": "samples/s"}
        return ", ".join(f"{names.get(k, k)}={v:.4g}" for k, v in values.items() if isinstance(v, (int, float)))
