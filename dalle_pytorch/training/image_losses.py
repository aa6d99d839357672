"""Losses of an image tokenizer beyond the pixels' error: LPIPS, and an adversary that learns beside it.

Everything is one loss with one backward pass: an optimiser step, an accumulation, a resumed run and several processes
work as they do without. Three facts make that possible:

- The losses of an image are differentiated where the decoder ends, each once. What they have to say there (a tensor of
  the image's size) goes on into the network, so that no network is passed twice and the discriminator's weights get no
  gradient from the tokenizer's loss.
- The discriminator learns from the same reconstructions in the same step, as in LlamaGen; its parameters are groups of
  the same optimiser.
- The adaptive weight of the adversary is that of the steps before, so that all parts of a batch have the same.

Axes: b batch, c channels, H W pixels.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one, finite, not_negative
from dalle_pytorch.models.discriminator import Discriminator, DiscriminatorConfig, discriminator_loss, generator_loss
from dalle_pytorch.models.image_tokenizer import TrainableTokenizer
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.training.frozen import Frozen

LOSSES = ("hinge", "non_saturating")
MEMORY = 0.9
"""Decay of the gradient norms' averages from step to step."""
MAX_SCALE = 1e4
"""Bound of the adaptive weight, that of taming-transformers."""


@dataclass(kw_only=True)
class PerceptualConfig:
    """LPIPS as a loss."""

    weight: float = 0.0
    """Beside the pixels' error; 0 = off."""
    network: str | None = None
    """torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth: a file, a folder with it, or an id of the hub."""
    heads: str | None = None
    """LPIPS' own weights, vgg.pth or alex.pth of version 0.1; null = those of torchmetrics."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range, or a weight without a network.
        """
        finite(self)
        not_negative(self, "weight")
        if self.weight and self.network is None:
            raise UserError(
                "perceptual.weight needs perceptual.network=, torchvision's vgg16-397923af.pth "
                "(https://download.pytorch.org/models/vgg16-397923af.pth)"
            )


@dataclass(kw_only=True)
class AdversaryConfig:
    """A discriminator that learns beside the tokenizer."""

    weight: float = 0.0
    """Of the adversarial loss; 0 = off. With ``adaptive`` its gradient is this part of the other losses' gradient."""
    adaptive: bool = True
    """Scale by the ratio of the gradients' norms at the decoder's output."""
    start: int = 0
    """Step at which both begin."""
    warmup_steps: int = 0
    """Steps from there over which the weight grows from 0, while the discriminator learns already."""
    loss: str = "hinge"
    """"hinge" or "non_saturating"."""
    r1: float = 0.0
    """Weight (gamma) of the gradient penalty on real images; 0 = off."""
    r1_every: int = 16
    """Steps between two penalties, each weighted by as much."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """Its sizes."""
    lr: float = 4e-4
    """Its highest learning rate; the schedule is that of ``optim``."""
    betas: list[float] = field(default_factory=lambda: [0.5, 0.9])
    """Decay rates of its two moments."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        finite(self)
        not_negative(self, "weight", "start", "warmup_steps", "r1")
        at_least_one(self, "r1_every")
        if self.loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.lr <= 0:
            raise UserError(f"lr must be above 0, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be two numbers in [0, 1), got {self.betas}")


class ImageLoss(NamedTuple):
    """Losses of a batch."""

    loss: Float[Tensor, ""]
    """What is minimised, by tokenizer and discriminator together."""
    parts: dict[str, Tensor | float]
    """For the logs."""


class ImageLosses(nn.Module):
    """The pixels' error, LPIPS and the adversary, weighted.

    Args:
        perceptual: settings of LPIPS.
        adversary: settings of the discriminator.
        lpips: the network, where it has a weight; frozen, and no part of a checkpoint.
        channels: image channels.

    Source:
        Esser et al. 2021, https://arxiv.org/abs/2012.09841, section 3.1. Deviations: the adaptive weight compares
        gradients at the decoder's output, where the paper takes those of its last layer's weights, and is an average
        over the steps before; R1 after Mescheder et al. 2018, https://arxiv.org/abs/1801.04406, every few steps as in
        StyleGAN2.
    """

    norms: Tensor
    sums: Tensor
    """Squared lengths of the gradients of the other losses and of the adversary: averages, and of this step so far."""

    def __init__(
        self, perceptual: PerceptualConfig, adversary: AdversaryConfig, *, lpips: LPIPS | None = None, channels: int = 3
    ) -> None:
        super().__init__()
        self.perceptual, self.adversary = perceptual, adversary
        self.lpips = None if lpips is None else Frozen(lpips)
        self.discriminator = Discriminator(adversary.discriminator, channels) if adversary.weight else None
        if adversary.weight and adversary.adaptive:
            self.register_buffer("norms", torch.zeros(2))
            self.register_buffer("sums", torch.zeros(2))

    @property
    def off(self) -> bool:
        """Whether there is nothing but the pixels' error."""
        return self.lpips is None and self.discriminator is None

    @property
    def compilable(self) -> list[nn.Module]:
        """Networks that torch.compile takes: R1 differentiates twice, which it cannot."""
        discriminator = None if self.adversary.r1 else self.discriminator
        networks = (discriminator, None if self.lpips is None else self.lpips.net)
        return [network for network in networks if network is not None]

    def active(self, step: int) -> bool:
        """Whether the adversary takes part in a step."""
        return self.discriminator is not None and step >= self.adversary.start

    def groups(self) -> list[dict[str, Any]]:
        """Parameters of the discriminator, as a group of an optimiser."""
        if self.discriminator is None:
            return []
        beta1, beta2 = self.adversary.betas
        parameters = list(self.discriminator.parameters())
        return [
            {
                "params": parameters,
                "lr": self.adversary.lr,
                "betas": (beta1, beta2),
                "weight_decay": 0.0,
                "name": "discriminator",
            }
        ]

    def forward(
        self,
        net: TrainableTokenizer,
        output: Float[Tensor, "b maps H W"],
        images: Float[Tensor, "b c H W"],
        step: int,
    ) -> ImageLoss:
        """Loss of the decoder's output for a batch (of one process, or a part of it).

        Args:
            net: knows the pixels' error, and makes images of outputs.
            output: with a gradient.
            images: the originals.
            step: optimiser steps taken.
        """
        if self.off:
            error = net.reconstruction_error(output, images)
            return ImageLoss(error, {"reconstruction": error})
        with self._precision(images.device.type):
            gradient, value, parts = self._near(net, output, images)
            learnt = output.new_zeros(())
            if self.discriminator is not None and self.active(step):
                against, adversarial, learnt, more = self._judged(net, output, images, step)
                weight = self._weight(gradient, against, step)
                gradient, value = gradient + weight * against, value + weight * adversarial
                parts |= {**more, "adversary_weight": weight}
            elif self.discriminator is not None:  # DDP waits for a gradient of every parameter
                learnt = 0 * torch.stack([p.sum() for p in self.discriminator.parameters()]).sum()
        return ImageLoss(_WithGradient.apply(output, gradient, value) + learnt, parts)

    def _near(
        self, net: TrainableTokenizer, output: Float[Tensor, "b maps H W"], images: Float[Tensor, "b c H W"]
    ) -> tuple[Float[Tensor, "b maps H W"], Float[Tensor, ""], dict[str, Tensor | float]]:
        """Gradient and value of the losses that compare images, and their parts."""
        leaf, copies = _leaf(net, output)
        loss = error = net.reconstruction_error(leaf, images)
        parts: dict[str, Tensor | float] = {"reconstruction": error.detach()}
        if self.lpips is not None:
            distance = self.lpips.net(copies, images).mean()
            loss = loss + self.perceptual.weight * distance
            parts["lpips"] = distance.detach()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient, loss.detach(), parts

    def _judged(
        self, net: TrainableTokenizer, output: Float[Tensor, "b maps H W"], images: Float[Tensor, "b c H W"], step: int
    ) -> tuple[Float[Tensor, "b maps H W"], Float[Tensor, ""], Float[Tensor, ""], dict[str, Tensor | float]]:
        """Gradient and value of the adversarial loss, the discriminator's own loss, and their parts."""
        assert self.discriminator is not None
        leaf, copies = _leaf(net, output)
        real, fake = self.discriminator(images).float(), self.discriminator(copies).float()
        adversarial = generator_loss(fake, self.adversary.loss)
        (against,) = torch.autograd.grad(adversarial, leaf, retain_graph=True)
        learnt = discriminator_loss(real, fake, self.adversary.loss)
        parts: dict[str, Tensor | float] = {
            "adversarial": adversarial.detach(), "discriminator": learnt.detach(),
            "real": real.detach().mean(), "fake": fake.detach().mean(),
        }  # fmt: skip
        if self.adversary.r1 and step % self.adversary.r1_every == 0:
            penalty = self._slope(images)
            learnt = learnt + self.adversary.r1 / 2 * self.adversary.r1_every * penalty
            parts["r1"] = penalty.detach()
        return against, adversarial.detach(), learnt, parts

    @staticmethod
    def _precision(device_type: str) -> AbstractContextManager[Any]:
        """Not float16, which would lose the gradient of a pixel: it is taken before the loss is scaled."""
        if torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == torch.float16:
            return torch.autocast(device_type, enabled=False)
        return nullcontext()

    def _slope(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, ""]:
        """Mean squared norm of the discriminator's gradient at real images."""
        assert self.discriminator is not None
        with torch.autocast(images.device.type, enabled=False):
            images = images.detach().requires_grad_()
            scores = self.discriminator(images).mean(dim=(1, 2, 3))
            (slope,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        return slope.square().sum(dim=(1, 2, 3)).mean()

    def _weight(
        self, gradient: Float[Tensor, "b maps H W"], against: Float[Tensor, "b maps H W"], step: int
    ) -> Float[Tensor, ""] | float:
        """The adversary's weight in this step; notes the norms for those after it."""
        weight = self.adversary.weight
        if step < self.adversary.start + self.adversary.warmup_steps:
            weight *= (step - self.adversary.start) / self.adversary.warmup_steps
        if not self.adversary.adaptive:
            return weight
        self.sums += torch.stack([gradient.square().sum(), against.square().sum()])
        near, far = self.norms
        scale = torch.where(far > 0, (near / far.clamp_min(1e-30)).sqrt(), 0).clamp(max=MAX_SCALE)
        return weight * scale

    @torch.no_grad()
    def end_step(self, step: int, reduce: Callable[[Tensor], Tensor] | None, *, apart: bool = False) -> None:
        """Finish the gradients of an optimiser step, before they are clipped.

        Args:
            step: its number.
            reduce: averages a tensor over the processes; None where there is one.
            apart: the gradients are not averaged over the processes yet.
        """
        if self.discriminator is None:
            return
        if not self.active(step):
            for parameter in self.discriminator.parameters():
                parameter.grad = None  # its optimiser's state begins when it does
            return
        if apart and reduce is not None:
            for parameter in self.discriminator.parameters():
                assert parameter.grad is not None
                parameter.grad = reduce(parameter.grad)
        self.discriminator.follow_weights()
        if not self.adversary.adaptive:
            return
        sums = self.sums if reduce is None else reduce(self.sums)
        if sums.isfinite().all():
            self.norms.copy_(sums if not self.norms.any() else torch.lerp(sums, self.norms, MEMORY))
        self.sums.zero_()


def _leaf(
    net: TrainableTokenizer, output: Float[Tensor, "b maps H W"]
) -> tuple[Float[Tensor, "b maps H W"], Float[Tensor, "b c H W"]]:
    """The decoder's output apart from the network, and its images."""
    leaf = output.detach().requires_grad_()
    return leaf, net.to_pixels(leaf, clamp=False)


class _WithGradient(torch.autograd.Function):
    """A number as if it were computed from a tensor, with the gradient that is given."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        """The number."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        """The gradient, times that of the number."""
        (gradient,) = ctx.saved_tensors
        return scale * gradient, None, None
