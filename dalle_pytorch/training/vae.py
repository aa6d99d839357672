"""Training of image tokenizers: the schedules of a DiscreteVAE's loss, and how well codes are used."""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from omegaconf import MISSING
from torch import Tensor

from dalle_pytorch.config import RENAMED, register
from dalle_pytorch.data.batches import Batch
from dalle_pytorch.errors import ConfigError
from dalle_pytorch.models.conv_tokenizer import ConvConfig
from dalle_pytorch.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.vq_vae import QUANTIZERS, VQVAE, NarrowConfig, VQVAEConfig
from dalle_pytorch.training.base import LitBase, tile
from dalle_pytorch.training.config import RunConfig
from dalle_pytorch.training.schedules import ScheduleConfig, scheduled

AnyVAE: TypeAlias = DiscreteVAE | VQVAE

SHOWN = 16  # pictures in a grid of reconstructions
MODELS: dict[str, type[ConvConfig]] = {"dvae": DiscreteVAEConfig, **QUANTIZERS}
"""Schemas of the options of model=."""
for _name, _config in MODELS.items():
    register(_name, _config, group="model")
RENAMED["vq"] = "say model.NAME=, with model=vq, model=fsq or model=ibq"
RENAMED["network"] = "model=NAME chooses the network, as model=vq or model=dalle_mini"


@dataclass(kw_only=True)
class TrainVAEConfig(RunConfig):
    """Settings of train_vae.py."""

    model: Any = MISSING
    """Sizes and codebook; model=base, paper and tiny are a DiscreteVAE's, model=vq, fsq and ibq have other codebooks in
    the same convolutions."""
    gumbel_tau: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(start=1.0, end=0.0625))
    """Temperature of the relaxation (paper: 1 to 1/16)."""
    kl_weight: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(start=0.0, end=6.6))
    """Weight of the KL term, the paper's beta (0 to 6.6 for 8 x 8 patches)."""
    usage_weight: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(start=0.0, end=0.0))
    """Weight of the usage term, which keeps codes alive; 0 = off, as in the paper. These three are a DiscreteVAE's."""

    @property
    def schema(self) -> str:
        """Option of ``schema/model`` that the model's settings are of."""
        return next(name for name, config in MODELS.items() if type(self.model) is config)


def make_vae(config: DiscreteVAEConfig | NarrowConfig) -> AnyVAE:
    """The network of a config, with fresh weights."""
    return DiscreteVAE(config) if isinstance(config, DiscreteVAEConfig) else VQVAE(VQVAEConfig.of(config))


def check_schedules(config: TrainVAEConfig, explicit: Set[str]) -> None:
    """Refuse schedules of a DiscreteVAE's loss for another network.

    Args:
        config: says what is trained.
        explicit: dotted names of the settings that the command line gives.

    Raises:
        ConfigError: names the setting.
    """
    schedules = ("gumbel_tau", "kl_weight", "usage_weight")
    given = sorted(name for name in explicit if name.partition(".")[0] in schedules)
    if given and not isinstance(config.model, DiscreteVAEConfig):
        raise ConfigError(
            f"{given[0]} is a setting of a DiscreteVAE's loss, and model={config.schema} has none: leave it out"
        )


class LitVAE(LitBase[AnyVAE]):
    """Trains a DiscreteVAE or a VQVAE.

    The best checkpoint is the one of the highest PSNR: the loss itself grows with the KL weight's schedule.
    """

    monitor = "val/psnr"
    monitor_mode = "max"

    def __init__(self, net: AnyVAE, config: TrainVAEConfig) -> None:
        super().__init__(net, config.optim, config.seed)
        self.gumbel_tau, self.kl_weight, self.usage_weight = config.gumbel_tau, config.kl_weight, config.usage_weight
        self.usage = torch.zeros(net.codebook_size)
        self.squared_error, self.subpixels = 0.0, 0

    def on_fit_start(self) -> None:
        """Several processes learn one codebook."""
        if isinstance(self.net, VQVAE) and self.trainer.world_size > 1:
            self.net.quantizer.share()

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Loss of a batch, under the schedules of this step."""
        images = batch["images"]
        if isinstance(self.net, VQVAE):
            found = self.net.loss(images)
            parts = {"loss": found.loss, "reconstruction": found.reconstruction, "codebook": found.codebook}
            self.log_losses("train", parts, len(images))
            return found.loss
        tau = scheduled(self.gumbel_tau, self.global_step, self.total_steps)
        kl_weight = scheduled(self.kl_weight, self.global_step, self.total_steps)
        usage_weight = scheduled(self.usage_weight, self.global_step, self.total_steps)
        generator = self.step_generator(batch_idx, images.device)
        result = self.net.loss(
            images, gumbel_tau=tau, kl_weight=kl_weight, usage_weight=usage_weight, generator=generator
        )
        values = {"loss": result.loss, "reconstruction": result.reconstruction, "kl": result.kl, "usage": result.usage}
        self.log_losses("train", values | {"gumbel_tau": tau, "kl_weight": kl_weight}, len(images))
        return result.loss

    def on_validation_epoch_start(self) -> None:
        """Start the counts."""
        self.usage = torch.zeros(self.net.codebook_size, device=self.device)
        self.squared_error, self.subpixels = 0.0, 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Reconstruct from hard codes, as DALLE will."""
        images = batch["images"]
        tokens = self.net.encode(images)
        error = (self.net.decode(tokens) - images).float().square()
        self.squared_error += float(error.sum())
        self.subpixels += error.numel()
        self.usage += count_codes(tokens, self.net.codebook_size)

    def on_validation_epoch_end(self) -> None:
        """Log PSNR (of the mean squared error over the split), share of codes used, perplexity."""
        totals = torch.tensor([self.squared_error, float(self.subpixels)], device=self.device)
        if self.trainer.world_size > 1:
            totals, self.usage = (self.trainer.strategy.reduce(x, reduce_op="sum") for x in (totals, self.usage))
        # All processes have the same values here; sync_dist keeps Lightning from doubting it.
        self.log("val/psnr", -10 * (totals[0] / totals[1]).clamp_min(1e-12).log10(), prog_bar=True, sync_dist=True)
        self.log("val/codebook_usage", (self.usage > 0).float().mean(), prog_bar=True, sync_dist=True)
        self.log("val/perplexity", perplexity(self.usage), sync_dist=True)

    def pictures(self, batch: Batch) -> Float[Tensor, "3 H W"]:
        """Originals above their reconstructions."""
        originals = batch["images"][:SHOWN]
        with eval_mode(self.net):
            copies = self.net.decode(self.net.encode(originals))
        rows = [row for pair in zip(originals.split(8), copies.split(8), strict=True) for row in pair]
        return tile(torch.cat(rows), columns=min(8, len(originals)))


def count_codes(image_tokens: Int[Tensor, "b n"], codebook_size: int) -> Float[Tensor, " k"]:
    """How often each code occurs."""
    return torch.bincount(image_tokens.flatten(), minlength=codebook_size).float()


def perplexity(counts: Float[Tensor, " k"]) -> Float[Tensor, ""]:
    """exp(entropy) of the codes: 1 = one code only, codebook_size = all equally often."""
    share = counts / counts.sum().clamp_min(1)
    return torch.special.entr(share).sum().exp()
