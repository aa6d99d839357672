"""LPIPS: how different two images look to a VGG-16 or an AlexNet, with a learnt weight for each channel.

Standard files: torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth, and the heads vgg.pth or alex.pth of
richzhang/PerceptualSimilarity (version 0.1), which torchmetrics brings along.

Axes: b batch, c channels, H W pixels.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.checks import check_same_shape

EPS = 1e-10  # lpips/__init__.py, `normalize_tensor`


class Conv(NamedTuple):
    """A convolution of a network, a ReLU after it."""

    place: int
    """Its index in torchvision's ``features``."""
    width: int
    """Output channels."""
    kernel: int = 3
    stride: int = 1


class Network(NamedTuple):
    """What LPIPS looks through."""

    stages: tuple[tuple[Conv, ...], ...]
    """The features after each are compared."""
    pooled: tuple[int, ...]
    """Numbers of the stages that begin with a max pooling of stride 2."""
    pool: int
    """Its kernel."""
    least_size: int
    """Below this the last stage has no pixel left."""

    @property
    def widths(self) -> list[int]:
        """Channels after each stage."""
        return [stage[-1].width for stage in self.stages]


NETWORKS = {
    "vgg": Network(
        (
            (Conv(0, 64), Conv(2, 64)),
            (Conv(5, 128), Conv(7, 128)),
            (Conv(10, 256), Conv(12, 256), Conv(14, 256)),
            (Conv(17, 512), Conv(19, 512), Conv(21, 512)),
            (Conv(24, 512), Conv(26, 512), Conv(28, 512)),
        ),
        pooled=(1, 2, 3, 4),
        pool=2,
        least_size=16,
    ),
    "alex": Network(
        ((Conv(0, 64, 11, 4),), (Conv(3, 192, 5),), (Conv(6, 384),), (Conv(8, 256),), (Conv(10, 256),)),
        pooled=(1, 2),
        pool=3,
        least_size=31,
    ),
}


class LPIPS(nn.Module):
    """Distance of images in [0, 1], near 0 for equal looks.

    Args:
        network: "vgg", or "alex", the authors' advice for a metric; losses commonly use "vgg".

    Source:
        Zhang et al. 2018, https://arxiv.org/abs/1801.03924; lpips/lpips.py, version 0.1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: str = "vgg") -> None:
        super().__init__()
        self.name, self.network = network, NETWORKS[network]
        self.features = nn.ModuleDict()
        source = 3
        for conv in (conv for stage in self.network.stages for conv in stage):
            padding = 2 if conv.stride > 1 else conv.kernel // 2
            self.features[str(conv.place)] = nn.Conv2d(source, conv.width, conv.kernel, conv.stride, padding)
            source = conv.width
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(1, w, 1, 1)) for w in self.network.widths])
        # of images in [-1, 1]: lpips/lpips.py, `ScalingLayer`
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "b 3 H W"], targets: Float[Tensor, "_ _ _ _"]) -> Float[Tensor, " b"]:
        """Distance of each image to its target.

        Raises:
            ValueError: unequal shapes, or images smaller than 16 pixels (AlexNet: 31).
        """
        check_same_shape(images, targets)
        if min(images.shape[2:]) < (least := self.network.least_size):
            raise UserError(f"LPIPS needs images of at least {least} pixels, got {tuple(images.shape[2:])}")
        total = torch.zeros(len(images), device=images.device)
        for head, x, y in zip(self.heads, self.stages(images), self.stages(targets), strict=True):
            difference = (_unit(x) - _unit(y)).square()
            total = total + (difference * head).sum(dim=1).mean(dim=(1, 2))
        return total

    def stages(self, images: Float[Tensor, "b 3 H W"]) -> Iterator[Float[Tensor, "b c h w"]]:
        """Features after each stage of the network."""
        x = (images * 2 - 1 - self.shift) / self.scale
        for number, stage in enumerate(self.network.stages):
            if number in self.network.pooled:
                x = F.max_pool2d(x, self.network.pool, stride=2)
            for conv in stage:
                x = F.relu(self.features[str(conv.place)](x))
            yield x


def _unit(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Features of length one at each pixel."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPS)
