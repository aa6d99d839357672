"""Signals that ask a run to stop: it saves a checkpoint after the step it is in, and asks SLURM for another turn."""

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from dalle_pytorch.training.resume import checkpoint_path, prune

log = logging.getLogger(__name__)

# SIGTERM: a scheduler takes the machine away; USR1, USR2: it announces that (SLURM's --signal, submitit); INT: Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class PreemptedError(Exception):
    """A signal stopped the run; all that it learnt is saved.

    Args:
        number: the signal.
        path: the checkpoint.
        handler: what would have been called without `StopOnSignal`.
    """

    def __init__(self, number: int, path: Path, handler: Any = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}, saved {path}; resume=true continues")
        self.number, self.path, self.handler = number, path, handler

    def requeue(self) -> None:
        """Ask the scheduler to run the job again: through submitit where it started us, else SLURM itself.

        Not after SIGTERM, which cancels a job, nor Ctrl-C; where SLURM takes a job's machines away it requeues it.
        """
        if self.number in (signal.SIGTERM, signal.SIGINT):
            return
        owner = getattr(self.handler, "__self__", None)
        if callable(self.handler) and type(owner).__module__.startswith("submitit"):
            self.handler(self.number, None)
        elif "SLURM_JOB_ID" in os.environ and int(os.environ.get("SLURM_PROCID", 0)) == 0:
            job = os.environ["SLURM_JOB_ID"]
            if "SLURM_ARRAY_JOB_ID" in os.environ:
                job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            if done.returncode:
                log.error("scontrol requeue %s failed, the job ends here: %s", job, done.stderr.strip())
            else:
                log.info("asked SLURM for another turn of job %s", job)


class StopOnSignal(Callback):
    """Saves and ends the training when one of `SIGNALS` comes.

    Args:
        folder: where checkpoints are.
        keep_last: how many of them are kept.
        keep_every: those of every so many steps are kept for good; 0 = none.
    """

    def __init__(self, folder: Path, keep_last: int, keep_every: int = 0) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.received: int | None = None
        self.saved: Path | None = None
        self.before: dict[signal.Signals, Any] = {}
        self.step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, in place of Lightning."""
        self.step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT:  # once more ends the program at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, between two optimiser steps, if any process was asked to stop."""
        if trainer.global_step == self.step:  # gradients are being accumulated
            return
        self.step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            self.saved = checkpoint_path(self.folder, trainer.global_step)
            trainer.save_checkpoint(self.saved)
            if trainer.is_global_zero:
                prune(self.folder, self.keep_last, self.keep_every)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop before a validation, which may take longer than there is time."""
        self._stop(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop, now that the step that was saved is in the logs too."""
        self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        """Stop, if the run is saved.

        Raises:
            PreemptedError: it is.
        """
        if self.saved is not None:
            # a process that heard nothing itself stops for the same reason as the others
            heard = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
            number = signal.Signals(int(trainer.strategy.reduce(heard, reduce_op="max")))
            raise PreemptedError(number, self.saved, self.before.get(number))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
