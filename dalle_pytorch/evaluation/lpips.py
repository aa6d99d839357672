"""LPIPS: how different two pictures look to a VGG-16 with a learnt weight for each channel.

Standard files: torchvision's vgg16-397923af.pth, and the heads vgg.pth of richzhang/PerceptualSimilarity (version 0.1),
which torchmetrics brings along.

Axes: b pictures, c channels, H W pixels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.checks import check_same_shape

STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
"""Places of the convolutions in torchvision's ``vgg16().features``; a pooling lies between two stages."""
WIDTHS = (64, 128, 256, 512, 512)
LEAST_SIZE = 16
"""Below this the last stage has no pixel left."""
EPS = 1e-10  # lpips/__init__.py, `normalize_tensor`


class LPIPS(nn.Module):
    """Distance of pictures in [0, 1], near 0 for equal looks.

    Source:
        Zhang et al. 2018, https://arxiv.org/abs/1801.03924; lpips/lpips.py, net="vgg", version 0.1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        self.features = nn.ModuleDict()
        for stage, width in zip(STAGES, WIDTHS, strict=True):
            for place in stage:
                self.features[str(place)] = nn.Conv2d(inputs, width, 3, padding=1)
                inputs = width
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(1, width, 1, 1)) for width in WIDTHS])
        # of pictures in [-1, 1]: lpips/lpips.py, `ScalingLayer`
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)

    def forward(self, images: Float[Tensor, "b 3 H W"], targets: Float[Tensor, "_ _ _ _"]) -> Float[Tensor, " b"]:
        """Distance of each picture to its target.

        Raises:
            ValueError: unequal shapes, or pictures smaller than 16 pixels.
        """
        check_same_shape(images, targets)
        if min(images.shape[2:]) < LEAST_SIZE:
            raise UserError(f"LPIPS needs pictures of at least {LEAST_SIZE} pixels, got {tuple(images.shape[2:])}")
        total = torch.zeros(len(images), device=images.device)
        for head, x, y in zip(self.heads, self.stages(images), self.stages(targets), strict=True):
            difference = (_unit(x) - _unit(y)).square()
            total = total + (difference * head).sum(dim=1).mean(dim=(1, 2))
        return total

    def stages(self, images: Float[Tensor, "b 3 H W"]) -> Iterator[Float[Tensor, "b c h w"]]:
        """Features after each stage of the VGG."""
        x = (images * 2 - 1 - self.shift) / self.scale
        for number, stage in enumerate(STAGES):
            if number:
                x = F.max_pool2d(x, 2)
            for place in stage:
                x = F.relu(self.features[str(place)](x))
            yield x


def _unit(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Features of length one at each pixel."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + EPS)
