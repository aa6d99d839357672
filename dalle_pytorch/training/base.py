"""What the three LightningModules share: optimiser, schedules, random source of a step, checkpoint header."""

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from dalle_pytorch.checkpoint import header
from dalle_pytorch.data.datamodule import Batch
from dalle_pytorch.training.optim import OptimConfig, make_optimizer, make_scheduler

Net = TypeVar("Net", bound=nn.Module)


class LitBase(pl.LightningModule, Generic[Net]):
    """Optimise ``net.loss``; everything about the network itself lives in ``net``.

    Args:
        net: the model.
        optim: optimiser settings.
        seed: all randomness of a training step is a function of (seed, step, rank), so that a resumed run
            goes on as if it had not stopped.
    """

    monitor: ClassVar[str]
    """The validation metric that says which checkpoint is best."""
    monitor_mode: ClassVar[str] = "min"

    def __init__(self, net: Net, optim: OptimConfig, seed: int) -> None:
        super().__init__()
        self.net, self.optim, self.seed = net, optim, seed

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return int(self.trainer.estimated_stepping_batches)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with decay groups, the learning rate set anew in every step."""
        # Lightning refuses to clip for a fused optimiser under mixed precision (it might unscale gradients itself).
        fused = not str(self.trainer.precision).endswith("mixed")
        optimizer = make_optimizer(self.net, self.optim, fused=fused)
        scheduler = make_scheduler(optimizer, self.optim, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout, which has no generator of its own."""
        torch.manual_seed(self.step_seed(batch_idx, "dropout"))

    def step_seed(self, batch_idx: int, use: str) -> int:
        """A seed for one use in one step; accumulated batches and ranks differ."""
        name = f"{self.seed}/{self.global_step}/{batch_idx}/{self.global_rank}/{use}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    def step_generator(self, batch_idx: int, device: torch.device | str) -> torch.Generator:
        """Random source of the loss in one step."""
        return torch.Generator(device).manual_seed(self.step_seed(batch_idx, "loss"))

    def log_losses(self, stage: str, values: Mapping[str, Tensor | float], size: int, bar: str = "loss") -> None:
        """Log values as ``stage/name``; ``bar`` also goes to the progress bar."""
        for name, value in values.items():
            self.log(f"{stage}/{name}", value, prog_bar=name == bar, batch_size=size, sync_dist=stage == "val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put our header into Lightning's file, so that ``dalle_pytorch.load`` reads it as well."""
        checkpoint.update(header(self.net, {"step": self.global_step}))

    def pictures(self, batch: Batch) -> Float[Tensor, "3 H W"]:
        """One picture, in [0, 1], that shows how far the training is.

        Args:
            batch: the first validation batch.
        """
        raise NotImplementedError


def tile(images: Float[Tensor, "b 3 H W"], columns: int) -> Float[Tensor, "3 h w"]:
    """Pictures side by side, row after row, with two white pixels between them."""
    gap = 2
    count, _, height, width = images.shape
    rows = -(-count // columns)
    shape = (3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    canvas = torch.ones(shape, device=images.device)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas
