"""What keeps a long training alive: clipping, steps with non-finite gradients left out, scales in the logs."""

import logging
import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.blocks import BLOCKS

log = logging.getLogger(__name__)

MOST_SKIPPED = 20  # steps in a row; the paper's 16-bit run left out about 1 in 20 in all (section D)


def clip_gradients(parameters: list[nn.Parameter], clip: float) -> float:
    """Scale gradients in place to a norm of at most ``clip``; 0 = leave them, and leave them if they are not finite.

    Returns:
        Their norm before, over all processes; not finite if one of them is not.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients)
    total = total.full_tensor() if isinstance(total, DTensor) else total
    norm = float(total)
    if clip and math.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, total)
    return norm


def is_logged(trainer: pl.Trainer) -> bool:
    """Whether the step that runs now goes to the loggers."""
    return (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[missing-attribute]


class SkippedSteps:
    """Counts optimiser steps that were left out because gradients were not finite."""

    def __init__(self) -> None:
        self.in_a_row, self.total = 0, 0

    def note(self, finite: bool, net: nn.Module, step: int, overflowed: int = 0) -> None:
        """Count a step.

        Args:
            finite: whether it is to be taken.
            net: its gradients are looked at.
            step: its number.
            overflowed: branches whose scaled gradients overflowed; their scales fall, so such steps are never too many.

        Raises:
            UserError: too many in a row were not finite; names the parameters.
        """
        if finite:
            self.in_a_row = 0
            return
        self.total += 1
        if overflowed:
            log.warning("step %d left out: %d branches overflowed (%d steps so far)", step, overflowed, self.total)
            return
        self.in_a_row += 1
        names = [name for name, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        if self.in_a_row >= MOST_SKIPPED:
            config = getattr(net, "config", None)
            options = {"qk_norm": "true", "z_loss": "1e-4"}
            mends = "".join(f", model.{name}={value}" for name, value in options.items() if hasattr(config, name))
            raise UserError(
                f"{self.in_a_row} steps in a row up to step {step} had gradients that are not finite, in {where}: "
                f"lower optim.lr, or set optim.clip=1, trainer.precision=bf16-mixed{mends}"
            )
        log.warning("step %d left out: gradients are not finite in %s (%d steps so far)", step, where, self.total)


class ActivationScales(Callback):
    """Logs the root mean square of every block's output, ``scale/block_00`` and on."""

    def __init__(self) -> None:
        self.scales: dict[str, Tensor] = {}
        self.hooks: list[Any] = []
        self.wanted = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the blocks."""
        blocks = [(name, part) for name, part in pl_module.named_modules() if isinstance(part, BLOCKS)]
        for number, (_, block) in enumerate(blocks):
            self.hooks.append(block.register_forward_hook(self._note(f"scale/block_{number:02d}")))

    def _note(self, name: str) -> Any:
        def hook(block: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.wanted:
                self.scales[name] = output.detach().float().square().mean().sqrt()

        return hook

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch in the steps that are logged."""
        self.wanted = is_logged(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand them to the loggers."""
        for name, scale in self.scales.items():
            pl_module.log(name, scale)
        self.scales.clear()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop watching."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
