"""PatchGAN: which patches of an image are real; the adversary of an image tokenizer's training.

Axes: b batch, c channels, H W pixels, h w patches.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from dalle_pytorch.errors import UserError, at_least_one

NORMS = ("group", "spectral", "none")
GROUPS = 8


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """Sizes of a PatchGAN."""

    width: int = 64
    """Channels of the first convolution, doubled by each up to eight times."""
    num_layers: int = 3
    """Convolutions of stride 2: 3 look at patches of 70 x 70 pixels, 2 at 34 x 34, 1 at 16 x 16."""
    norm: str = "group"
    """"group" (GroupNorm, where the papers have batch norm, which would make a step depend on how its batch is split),
    "spectral" (spectral normalisation of the weights) or "none"."""

    @property
    def least_size(self) -> int:
        """Pixels along a side, below which there is no patch."""
        return 3 * 2**self.num_layers

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        at_least_one(self, "width", "num_layers")
        if self.norm not in NORMS:
            raise UserError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.norm == "group" and self.width % GROUPS:
            raise UserError(f"width must be a multiple of {GROUPS} with norm=group, got {self.width}")


class Discriminator(nn.Module):
    """Images to a score of each patch, high for real ones.

    Args:
        config: sizes.
        channels: image channels.

    Source:
        Isola et al. 2017, https://arxiv.org/abs/1611.07004, appendix 6.1.2; as taming-transformers has it, but for the
        norms.
    """

    def __init__(self, config: DiscriminatorConfig, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, config.width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        source = config.width
        for number in range(1, config.num_layers + 1):
            target = config.width * min(2**number, 8)
            stride = 2 if number < config.num_layers else 1
            layers.append(nn.Conv2d(source, target, 4, stride=stride, padding=1))
            if config.norm == "group":
                layers.append(nn.GroupNorm(GROUPS, target))
            layers.append(nn.LeakyReLU(0.2))
            source = target
        self.layers = nn.Sequential(*layers, nn.Conv2d(source, 1, 4, stride=1, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)  # as in the paper, 6.2
                if config.norm == "spectral":
                    spectral_norm(layer)
        self.train()

    def forward(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 1 h w"]:
        """Scores of the patches of images in [0, 1]."""
        return self.layers(2 * images - 1)

    def train(self, mode: bool = True) -> "Discriminator":
        """As of every module, but spectral norms follow the weights in ``follow_weights`` alone.

        torch would have them do so in every forward pass, of which an accumulated step has more.
        """
        super().train(mode)
        for norm in self._spectral_norms():
            norm.eval()
        return self

    @torch.no_grad()
    def follow_weights(self) -> None:
        """One step of the power iteration of spectral normalisation; due in every optimiser step."""
        for norm in self._spectral_norms():
            norm.train()
            norm()
            norm.eval()

    def _spectral_norms(self) -> list[nn.Module]:
        return [part for part in self.modules() if isinstance(part, parametrize.ParametrizationList)]


def generator_loss(scores: Float[Tensor, "b 1 h w"], kind: str) -> Float[Tensor, ""]:
    """What the image tokenizer minimises so that its images score as real ones: "hinge" or "non_saturating"."""
    return -scores.mean() if kind == "hinge" else F.softplus(-scores).mean()


def discriminator_loss(real: Float[Tensor, "b 1 h w"], fake: Float[Tensor, "b 1 h w"], kind: str) -> Float[Tensor, ""]:
    """What the discriminator minimises.

    Source:
        Hinge: Lim and Ye 2017, https://arxiv.org/abs/1705.02894; non-saturating: Goodfellow et al. 2014,
        https://arxiv.org/abs/1406.2661. Both halved, as in taming-transformers.
    """
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2
