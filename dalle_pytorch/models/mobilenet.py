"""MobileNetV2: a small classifier of ImageNet, through which distances between sets of images can be measured.

The standard file is torchvision's mobilenet_v2-b0353104.pth (or mobilenet_v2-7ebf99e0.pth, better trained); layers have
its names.

Paper: Sandler et al. 2018, https://arxiv.org/abs/1801.04381, table 2.

Axes: b batch, c channels, H W pixels, e = 1280 features, k = 1000 classes.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.models.inception import FrozenNorm

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NORM_EPS = 1e-5
SIZE, FEATURES, CLASSES = 224, 1280, 1000
BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels, blocks and first stride of each group."""


class MobileNetV2(nn.Module):
    """Images to class scores; for use, not for training: its norms are frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_norm(3, 32, 3, stride=2)]
        source = 32
        for expansion, width, count, stride in BLOCKS:
            for number in range(count):
                layers.append(InvertedResidual(source, width, stride if number == 0 else 1, expansion))
                source = width
        self.features = nn.Sequential(*layers, conv_norm(source, FEATURES, 1))
        self.classifier = nn.Sequential(nn.Identity(), nn.Linear(FEATURES, CLASSES))  # a dropout in training
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b e"]:
        """Features of images in [0, 1], resized to 224 pixels."""
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        return self.features((images - self.mean) / self.std).mean(dim=(2, 3))

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k"]:
        """Class scores of images in [0, 1]."""
        return self.classifier(self.encode(images))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added where shapes agree."""

    def __init__(self, source: int, target: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = source * expansion
        expand = [conv_norm(source, hidden, 1)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            conv_norm(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, target, 1, bias=False),
            FrozenNorm(target, NORM_EPS),
        )
        self.residual = stride == 1 and source == target

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o _ _"]:
        """The resolution, or half of it."""
        return x + self.conv(x) if self.residual else self.conv(x)


def conv_norm(source: int, target: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU up to 6."""
    conv = nn.Conv2d(source, target, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, FrozenNorm(target, NORM_EPS), nn.ReLU6(inplace=True))
