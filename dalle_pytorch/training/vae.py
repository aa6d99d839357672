"""Training of image tokenizers: the schedules of a DiscreteVAE's loss, and how well codes are used."""

from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from omegaconf import MISSING
from torch import Tensor
from torch.optim import Optimizer

from dalle_pytorch.checkpoints.loading import load_vae
from dalle_pytorch.checkpoints.pretrained import load_lpips
from dalle_pytorch.config import RENAMED, register
from dalle_pytorch.data.batches import Batch
from dalle_pytorch.errors import ConfigError, UserError
from dalle_pytorch.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig
from dalle_pytorch.models.image_tokenizer import Reconstruction, Relaxation
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.quantizers import Quantizer
from dalle_pytorch.models.vq_vae import VQVAE, BSQConfig, FSQConfig, IBQConfig, LFQConfig, VQVAEConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
from dalle_pytorch.training.base import LitBase, tile
from dalle_pytorch.training.config import RunConfig
from dalle_pytorch.training.image_losses import AdversaryConfig, ImageLosses, PerceptualConfig
from dalle_pytorch.training.perturbation import Perturbation, PerturbationConfig, load_dalle
from dalle_pytorch.training.schedules import ScheduleConfig, scheduled

AnyVAE: TypeAlias = DiscreteVAE | VQVAE | VQGAN

SHOWN = 16  # pictures in a grid of reconstructions
MODELS: dict[str, type] = {
    "dvae": DiscreteVAEConfig,
    "vq": VQVAEConfig,
    "fsq": FSQConfig,
    "ibq": IBQConfig,
    "lfq": LFQConfig,
    "bsq": BSQConfig,
    "vqgan": VQGANConfig,
}
"""Schemas of the options of model=."""
for _name, _config in MODELS.items():
    register(_name, _config, group="model")
RENAMED["vq"] = "say model.NAME=, with model=vq, fsq, ibq, lfq or bsq"
RENAMED["network"] = "model=NAME chooses the network, as model=vq or model=dalle_mini"


@dataclass(kw_only=True)
class TrainVAEConfig(RunConfig):
    """Settings of train_vae.py."""

    model: Any = MISSING
    """Sizes and codebook; model=base, paper and tiny are a DiscreteVAE's, model=vq, fsq, ibq, lfq and bsq have other
    codebooks in the same convolutions, model=vqgan has VQGAN's network."""
    gumbel_tau: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(start=1.0, end=0.0625))
    """Temperature of the relaxation (paper: 1 to 1/16)."""
    kl_weight: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(start=0.0, end=6.6))
    """Weight of the KL term, the paper's beta (0 to 6.6 for 8 x 8 patches)."""
    usage_weight: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(start=0.0, end=0.0))
    """Weight of the usage term, which keeps codes alive; 0 = off, as in the paper. These three are for Gumbel-softmax
    codes: a DiscreteVAE's, or a VQGAN's of quantizer=gumbel."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """LPIPS as a loss."""
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    """A discriminator that learns beside the tokenizer."""
    init: str | None = None
    """An image tokenizer to go on from, or a DALLE with one: what ``dalle_pytorch.load`` takes. It brings ``model``."""
    perturbation: PerturbationConfig = field(default_factory=PerturbationConfig)
    """Decoder post-training: tokens that the decoder alone learns from, of ``init``."""

    @property
    def schema(self) -> str:
        """Option of ``schema/model`` that the model's settings are of."""
        return next(name for name, config in MODELS.items() if type(self.model) is config)


def make_vae(config: DiscreteVAEConfig | VQVAEConfig | VQGANConfig) -> AnyVAE:
    """The network of a config, with fresh weights."""
    if isinstance(config, VQGANConfig):
        return VQGAN(config)
    return DiscreteVAE(config) if isinstance(config, DiscreteVAEConfig) else VQVAE(config)


def has_logits(config: DiscreteVAEConfig | VQVAEConfig | VQGANConfig) -> bool:
    """Whether codes are a Gumbel-softmax's, which has schedules."""
    return isinstance(config, DiscreteVAEConfig) or config.quantizer == "gumbel"


def make_losses(config: TrainVAEConfig, net: AnyVAE) -> ImageLosses:
    """The losses of a training.

    Raises:
        FileNotFoundError: no such file of LPIPS' network.
        UserError: weights of another network, LPIPS for images that are not RGB, or images that are too small.
    """
    lpips = None
    if config.perceptual.weight:
        if net.channels != 3:
            raise UserError(f"LPIPS looks at RGB images, and model.channels is {net.channels}: set perceptual.weight=0")
        assert config.perceptual.network is not None
        lpips = load_lpips(config.perceptual.network, config.perceptual.heads)
        check_size(net, lpips.network.least_size, "perceptual.network", "set perceptual.weight=0")
    if config.adversary.weight:
        least = config.adversary.discriminator.least_size
        check_size(net, least, "adversary.discriminator", "lower adversary.discriminator.num_layers")
    return ImageLosses(config.perceptual, config.adversary, lpips=lpips, channels=net.channels)


def check_size(net: AnyVAE, least: int, what: str, mend: str) -> None:
    """Refuse images that a network of the losses cannot look at.

    Raises:
        UserError: names the setting, both sizes and the mend.
    """
    if net.image_size < least:
        raise UserError(f"{what} needs images of at least {least} pixels, and they have {net.image_size}: {mend}")


def make_perturbation(config: TrainVAEConfig, vae: AnyVAE) -> Perturbation | None:
    """What replaces tokens in post-training; None where everything learns.

    Raises:
        UserError: a DALLE of another image tokenizer, or more neighbours than codes.
    """
    settings = config.perturbation
    if not settings.share:
        return None
    return Perturbation(settings, vae, None if settings.dalle is None else load_dalle(settings.dalle, vae))


def start_from(config: TrainVAEConfig, explicit: Set[str]) -> AnyVAE | None:
    """The network of ``config.init``, its settings now ``config.model``; None where a training begins with a new one.

    Args:
        config: settings; changed where ``init`` is given.
        explicit: dotted names of the settings and groups that the command line gives.

    Raises:
        ConfigError: settings of a model beside ``init``, or post-training without it.
        UserError: ``init`` is no image tokenizer that can be trained.
    """
    if config.init is None:
        if config.perturbation.share:
            raise ConfigError("perturbation trains the decoder of a trained image tokenizer: say which with init=")
        return None
    if given := sorted(name for name in explicit if name.partition(".")[0] == "model"):
        raise ConfigError(f"init={config.init} brings its settings of the model: leave {given[0]} out")
    vae = load_vae(config.init)
    if not isinstance(vae, AnyVAE) or not vae.can_encode:
        raise UserError(f"init={config.init} is a {type(vae).__name__} that cannot be trained here, or has no encoder")
    config.model = vae.config
    return vae


def check_settings(config: TrainVAEConfig, explicit: Set[str]) -> None:
    """Refuse settings that nothing reads: of losses that are off, or of a DiscreteVAE's loss for another network.

    Args:
        config: says what is trained.
        explicit: dotted names of the settings that the command line gives.

    Raises:
        ConfigError: names the setting.
    """
    for group, weight in (("perceptual", config.perceptual.weight), ("adversary", config.adversary.weight)):
        off = sorted(name for name in explicit if name.startswith(f"{group}.") and name != f"{group}.weight")
        if off and not weight:
            raise ConfigError(f"{off[0]} changes nothing while {group}.weight is 0: set that, too")
    if "perturbation.neighbours" in explicit and (config.perturbation.dalle or not config.perturbation.share):
        raise ConfigError("perturbation.neighbours is for perturbation.share without a dalle: leave it out")
    schedules = ("gumbel_tau", "kl_weight", "usage_weight")
    given = sorted(name for name in explicit if name.partition(".")[0] in schedules)
    if given and config.perturbation.share:
        raise ConfigError(f"{given[0]} is a setting of the codes, and these rest in post-training: leave it out")
    if given and not has_logits(config.model):
        raise ConfigError(
            f"{given[0]} is a setting of a DiscreteVAE's loss, and model={config.schema} has none: leave it out"
        )


class LitVAE(LitBase[AnyVAE]):
    """Trains an image tokenizer.

    The best checkpoint is the one of the highest PSNR (the loss itself grows with the KL weight's schedule), or of the
    lowest LPIPS where that is part of the loss. In post-training both are of images decoded from replaced tokens.
    """

    gathers_bf16 = False  # codes are found in fp32, apart from the rest

    def __init__(self, net: AnyVAE, config: TrainVAEConfig) -> None:
        super().__init__(net, config.optim, config.seed)
        self.gumbel_tau, self.kl_weight, self.usage_weight = config.gumbel_tau, config.kl_weight, config.usage_weight
        self.losses = make_losses(config, net)
        self.forward_alone = self.losses.off
        self.monitor, self.monitor_mode = ("val/psnr", "max") if self.losses.lpips is None else ("val/lpips", "min")
        self.perturbation = make_perturbation(config, net)
        if self.perturbation is not None:
            net.requires_grad_(False)
            for part in net.decoding_parts:
                part.requires_grad_(True)
        self.usage = torch.zeros(net.codebook_size)
        self.squared_error, self.subpixels, self.distance, self.images = 0.0, 0, 0.0, 0

    def on_fit_start(self) -> None:
        """Several processes learn one codebook."""
        if isinstance(quantizer := getattr(self.net, "quantizer", None), Quantizer) and self.trainer.world_size > 1:
            quantizer.share()

    def compile_parts(self) -> None:
        """Compile the networks of a training step; validation, whose shapes and types are others, is not compiled."""
        for part in (self.net.encoder, self.net.decoder, *self.losses.compilable):
            if part is not None:
                part.compile()

    def other_groups(self) -> list[dict[str, Any]]:
        """The discriminator's parameters."""
        return self.losses.groups()

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Also the end of the losses' step; the discriminator is small and not sharded."""
        self.losses.end_step(self.global_step, self.mean_over_processes(), apart=self.sharded)
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Loss of a batch, under the schedules of this step."""
        images = batch["images"]
        relaxation = Relaxation(
            scheduled(self.gumbel_tau, self.global_step, self.total_steps),
            scheduled(self.kl_weight, self.global_step, self.total_steps),
            scheduled(self.usage_weight, self.global_step, self.total_steps),
        )
        if self.perturbation is None:
            found = self.net.reconstruct(images, relaxation, self.step_generator(batch_idx, images.device))
        else:
            tokens = self.net.encode(images)
            tokens = self.perturbation(tokens, batch["captions"], self.step_generator(batch_idx, "cpu"))
            found = Reconstruction(self.net.output(tokens).float(), images.new_zeros(()), {}, tokens)
        loss, parts = self.losses(self.net, found.output, images, self.global_step)
        loss = loss + found.codes_loss
        parts |= {"loss": loss, **found.parts}
        if has_logits(self.net.config) and self.perturbation is None:
            parts |= {"gumbel_tau": relaxation.gumbel_tau, "kl_weight": relaxation.kl_weight}
        self.log_losses("train", parts, len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the counts."""
        self.usage = torch.zeros(self.net.codebook_size, device=self.device)
        self.squared_error, self.subpixels, self.distance, self.images = 0.0, 0, 0.0, 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Reconstruct from hard codes, as DALLE will."""
        images = batch["images"]
        with torch.compiler.set_stance("force_eager"):
            tokens = self.net.encode(images)
            self.usage += count_codes(tokens, self.net.codebook_size)
            if self.perturbation is not None:
                tokens = self.perturbation(tokens, batch["captions"], torch.Generator().manual_seed(batch_idx))
            copies = self.net.decode(tokens).float()
            if self.losses.lpips is not None:
                self.distance += float(self.losses.lpips.net(copies, images).sum())
        self.squared_error += float((copies - images).square().sum())
        self.subpixels += images.numel()
        self.images += len(images)

    def on_validation_epoch_end(self) -> None:
        """Log PSNR (of the mean squared error over the split), LPIPS, share of codes used, perplexity."""
        sums = [self.squared_error, float(self.subpixels), self.distance, float(self.images)]
        totals = torch.tensor(sums, device=self.device)
        if self.trainer.world_size > 1:
            totals, self.usage = (self.trainer.strategy.reduce(x, reduce_op="sum") for x in (totals, self.usage))
        # All processes have the same values here; sync_dist keeps Lightning from doubting it.
        self.log("val/psnr", -10 * (totals[0] / totals[1]).clamp_min(1e-12).log10(), prog_bar=True, sync_dist=True)
        if self.losses.lpips is not None:
            self.log("val/lpips", totals[2] / totals[3], prog_bar=True, sync_dist=True)
        self.log("val/codebook_usage", (self.usage > 0).float().mean(), prog_bar=True, sync_dist=True)
        self.log("val/perplexity", perplexity(self.usage), sync_dist=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse one with another adversary.

        Raises:
            UserError: one of the two has a discriminator, or an adaptive weight, and the other has not.
        """
        saved = {name for name in checkpoint["state_dict"] if name.startswith("losses.")}
        if saved != {f"losses.{name}" for name in self.losses.state_dict()}:
            raise UserError(
                "the run was begun with other settings of adversary: resume with those, or start a new run from its "
                "weights with init= and another out="
            )
        super().on_load_checkpoint(checkpoint)

    def pictures(self, batch: Batch) -> Float[Tensor, "3 H W"]:
        """Originals above their reconstructions."""
        originals = batch["images"][:SHOWN]
        with eval_mode(self.net), torch.compiler.set_stance("force_eager"):
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
