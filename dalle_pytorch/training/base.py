"""What the three LightningModules share: optimiser, schedules, random source of a step, checkpoint header."""

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dalle_pytorch.checkpoints.checkpoint import header
from dalle_pytorch.data.batches import Batch
from dalle_pytorch.errors import ConfigError
from dalle_pytorch.models.blocks import BLOCKS
from dalle_pytorch.models.gradient_scaling import update_scales
from dalle_pytorch.training.optim import MuonAdamW, OptimConfig, make_optimizer, make_scheduler
from dalle_pytorch.training.sharding import shard
from dalle_pytorch.training.stability import SkippedSteps, clip_gradients, is_logged
from dalle_pytorch.training.strategies import PowerSGDStrategy

Net = TypeVar("Net", bound=nn.Module)


class LitBase(pl.LightningModule, Generic[Net]):
    """Optimise ``net.loss``; everything about the network itself lives in ``net``.

    Args:
        net: the model.
        optim: optimiser settings.
        seed: all randomness of a training step is a function of (seed, step, rank or sample), so that a resumed run
            goes on as if it had not stopped.
    """

    monitor: str
    """The validation metric that says which checkpoint is best."""
    monitor_mode: str = "min"
    gathers_bf16: ClassVar[bool] = True
    """Whether sharded weights are gathered in bfloat16 under bf16-mixed."""
    forward_alone: bool = True
    """Whether a step has no backward pass before Lightning's, so that its arithmetic can be counted by the forward."""

    def __init__(self, net: Net, optim: OptimConfig, seed: int) -> None:
        super().__init__()
        self.net, self.optim, self.seed = net, optim, seed
        self.skipped, self.sharded = SkippedSteps(), False
        self.settings: list[dict[str, Any]] = []

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training.

        Raises:
            ConfigError: nothing but a time limit ends it.
        """
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ConfigError("schedules need to know the last step: set trainer.max_steps= or +trainer.max_epochs=")
        return int(steps)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with decay groups, its learning rate set anew in every step."""
        # The loss scaling of float16 comes off before clipping, which a fused optimiser would do itself and later.
        optimizer = make_optimizer(self.net, self.optim, fused=str(self.trainer.precision) != "16-mixed")
        for group in self.other_groups():
            optimizer.add_param_group(group)
        self.settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        scheduler = make_scheduler(optimizer, self.optim, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def compile_parts(self) -> None:
        """Compile the transformers' blocks; what differs between networks stays as it is."""
        for block in (part for part in self.net.modules() if isinstance(part, BLOCKS)):
            block.compile()

    def other_groups(self) -> list[dict[str, Any]]:
        """Parameters outside ``net`` that are trained as well, with a ``name`` for the logs; clipped by themselves."""
        return []

    def on_train_start(self) -> None:
        """Take rates and decays from the settings: a checkpoint brings along those that it was trained with."""
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        assert isinstance(optimizer, Optimizer)
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [settings["lr"] for settings in self.settings]
        factor = scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group, settings in zip(optimizer.param_groups, self.settings, strict=True):
            group.update(settings, initial_lr=settings["lr"], lr=settings["lr"] * factor)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip to ``optim.clip``, log the norm, and leave out the step if a gradient is not finite."""
        overflowed = update_scales(self.net)
        parts: dict[str, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:
            parts.setdefault(group.get("name", ""), []).extend(group["params"])
        norms = {name: clip_gradients(parameters, self.optim.clip) for name, parameters in parts.items()}
        finite = all(map(math.isfinite, norms.values())) and not overflowed
        where = self if math.isfinite(norms[""]) else self.net  # names are shorter within the network
        self.skipped.note(finite, where, self.global_step, overflowed)
        for name, norm in norms.items():
            self.log(f"train/{name}_grad_norm" if name else "train/grad_norm", norm if finite else 0.0)
        self.log("train/skipped_steps", float(self.skipped.total))
        for group in optimizer.param_groups:  # groups of one kind share their rate; only Muon's have a momentum
            kind = "muon" if isinstance(optimizer, MuonAdamW) and "momentum" in group else group.get("name", "")
            self.log(f"train/{kind}_lr" if kind else "train/lr", group["lr"])
        if not finite:
            optimizer.zero_grad()  # without gradients an optimiser changes nothing
            if isinstance(self.trainer.strategy, PowerSGDStrategy):
                self.trainer.strategy.forget()

    def mean_over_processes(self) -> Callable[[Tensor], Tensor] | None:
        """Averages a number over the processes of the training; None where there is one."""
        strategy = self.trainer.strategy
        return None if self.trainer.world_size == 1 else lambda value: strategy.reduce(value.clone(), reduce_op="mean")

    def configure_model(self) -> None:
        """Shard the weights, if the strategy wants it; called by Lightning before the optimiser is made."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self.sharded:
            assert self.device_mesh is not None  # the strategy has set it
            shard(self.net, self.device_mesh, bf16=self.gathers_bf16 and str(self.trainer.precision) == "bf16-mixed")
            self.sharded = True

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout, which has no generator of its own."""
        torch.manual_seed(self.step_seed(batch_idx, "dropout"))

    def step_seed(self, batch_idx: int, use: str) -> int:
        """A seed for one use in one step; accumulated batches and ranks differ."""
        name = f"{self.seed}/{self.global_step}/{batch_idx}/{self.global_rank}/{use}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1

    def sample_rngs(self, batch: Batch, batch_idx: int, use: str) -> list[random.Random]:
        """A random source for each sample of a batch in one step, whatever process it is in; streams apart."""
        if "indices" in batch:
            names = [str(index) for index in batch["indices"].tolist()]
        else:
            names = [f"{self.global_rank}.{batch_idx}.{place}" for place in range(len(batch["captions"]))]
        return [random.Random(f"{self.seed}/{self.global_step}/{name}/{use}") for name in names]

    def step_generator(self, batch_idx: int, device: torch.device | str) -> torch.Generator:
        """Random source of the loss in one step."""
        return torch.Generator(device).manual_seed(self.step_seed(batch_idx, "loss"))

    def log_losses(self, stage: str, values: Mapping[str, Tensor | float | None], size: int, bar: str = "loss") -> None:
        """Log values that are there as ``stage/name``, means over all processes; ``bar`` also goes to the bar."""
        # Every key needs the same arguments in all calls, so in training we average ourselves; between two entries of
        # the logs the bar may show the first process's values.
        average = self.mean_over_processes() if stage == "train" and is_logged(self.trainer) else None
        for name, value in values.items():
            if value is None:
                continue
            if average is not None:
                value = average(torch.as_tensor(value, dtype=torch.float32, device=self.device).detach())
            shown = name == bar
            self.log(f"{stage}/{name}", value, prog_bar=shown, batch_size=size, sync_dist=stage == "val")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put our header into Lightning's file, so that ``dalle_pytorch.load`` reads it as well."""
        checkpoint.update(header(self.net, {"step": self.global_step}))
        checkpoint["skipped_steps"] = (self.skipped.in_a_row, self.skipped.total)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting the steps that were left out."""
        self.skipped.in_a_row, self.skipped.total = checkpoint["skipped_steps"]
        checkpoint["callbacks"].pop("Timer", None)  # trainer.max_time is that of one start, not of all together

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
