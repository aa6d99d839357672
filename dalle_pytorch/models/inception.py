"""The Inception v3 of FID: the network of TensorFlow's inception-2015-12-05, under the names of its PyTorch weights.

The standard file is pt_inception-2015-12-05-6726825d.pth (github.com/mseitzer/pytorch-fid and toshas/torch-fidelity),
with 1008 classes. torchvision's Inception v3 is another network: its averages count the border, its classes are 1000.

Architecture: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567; the deviations of the file (averages that leave out
the border, a maximum in the last block) as in pytorch-fid, inception.py.

Axes: b pictures, c channels, H W pixels, e = 2048 features, k = 1008 classes.
"""

from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIZE = 299
FEATURES, CLASSES = 2048, 1008

Step: TypeAlias = "str | tuple[str, ...]"
"""A unit or a pooling by name; several are a fork, whose outputs are joined."""
Units: TypeAlias = dict[str, tuple[int, int, tuple[int, int], int]]
"""Inputs, outputs, kernel and stride by name."""


class InceptionOutput(NamedTuple):
    """What FID and Inception score need."""

    features: Float[Tensor, "b e"]
    """After the last pooling."""
    logits: Float[Tensor, "b k"]
    """Class scores without their bias, as TensorFlow's Inception score takes them (torch-fidelity: logits_unbiased)."""


class FrozenNorm(nn.Module):
    """Batch norm with fixed statistics."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """Shift and scale each channel."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Unit(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1, *, pad: bool = True
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = FrozenNorm(outputs)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """Features of the next layer."""
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """An Inception block: several paths from one input, joined along the channels.

    Args:
        units: the convolutions by name; those of stride 2 have no padding.
        paths: steps of each path, in the order in which they are joined.
    """

    def __init__(self, units: Units, paths: list[tuple[Step, ...]]) -> None:
        super().__init__()
        self.paths = paths
        for name, (inputs, outputs, kernel, stride) in units.items():
            self.add_module(name, Unit(inputs, outputs, kernel, stride, pad=stride == 1))

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """All paths."""
        ends = []
        for path in self.paths:
            y = x
            for step in path:
                y = self.step(step, y) if isinstance(step, str) else torch.cat([self.step(s, y) for s in step], dim=1)
            ends.append(y)
        return torch.cat(ends, dim=1)

    def step(self, name: str, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """One convolution or pooling."""
        if name == "mean":
            return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if name == "max":
            return F.max_pool2d(x, 3, 1, 1)
        if name == "halve":
            return F.max_pool2d(x, 3, 2)
        return self.get_submodule(name)(x)


ONE, THREE, FIVE, WIDE, TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def block_35(inputs: int, pooled: int) -> Mixed:
    """Mixed_5b to Mixed_5d."""
    units: Units = {
        "branch1x1": (inputs, 64, ONE, 1),
        "branch5x5_1": (inputs, 48, ONE, 1),
        "branch5x5_2": (48, 64, FIVE, 1),
        "branch3x3dbl_1": (inputs, 64, ONE, 1),
        "branch3x3dbl_2": (64, 96, THREE, 1),
        "branch3x3dbl_3": (96, 96, THREE, 1),
        "branch_pool": (inputs, pooled, ONE, 1),
    }
    double = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
    return Mixed(units, [("branch1x1",), ("branch5x5_1", "branch5x5_2"), double, ("mean", "branch_pool")])


def block_35_to_17(inputs: int) -> Mixed:
    """Mixed_6a."""
    units: Units = {
        "branch3x3": (inputs, 384, THREE, 2),
        "branch3x3dbl_1": (inputs, 64, ONE, 1),
        "branch3x3dbl_2": (64, 96, THREE, 1),
        "branch3x3dbl_3": (96, 96, THREE, 2),
    }
    return Mixed(units, [("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"), ("halve",)])


def block_17(middle: int) -> Mixed:
    """Mixed_6b to Mixed_6e."""
    units: Units = {
        "branch1x1": (768, 192, ONE, 1),
        "branch7x7_1": (768, middle, ONE, 1),
        "branch7x7_2": (middle, middle, WIDE, 1),
        "branch7x7_3": (middle, 192, TALL, 1),
        "branch7x7dbl_1": (768, middle, ONE, 1),
        "branch7x7dbl_2": (middle, middle, TALL, 1),
        "branch7x7dbl_3": (middle, middle, WIDE, 1),
        "branch7x7dbl_4": (middle, middle, TALL, 1),
        "branch7x7dbl_5": (middle, 192, WIDE, 1),
        "branch_pool": (768, 192, ONE, 1),
    }
    single = tuple(f"branch7x7_{i}" for i in range(1, 4))
    double = tuple(f"branch7x7dbl_{i}" for i in range(1, 6))
    return Mixed(units, [("branch1x1",), single, double, ("mean", "branch_pool")])


def block_17_to_8() -> Mixed:
    """Mixed_7a."""
    units: Units = {
        "branch3x3_1": (768, 192, ONE, 1),
        "branch3x3_2": (192, 320, THREE, 2),
        "branch7x7x3_1": (768, 192, ONE, 1),
        "branch7x7x3_2": (192, 192, WIDE, 1),
        "branch7x7x3_3": (192, 192, TALL, 1),
        "branch7x7x3_4": (192, 192, THREE, 2),
    }
    second = tuple(f"branch7x7x3_{i}" for i in range(1, 5))
    return Mixed(units, [("branch3x3_1", "branch3x3_2"), second, ("halve",)])


def block_8(inputs: int, pooling: str) -> Mixed:
    """Mixed_7b and Mixed_7c."""
    units: Units = {
        "branch1x1": (inputs, 320, ONE, 1),
        "branch3x3_1": (inputs, 384, ONE, 1),
        "branch3x3_2a": (384, 384, (1, 3), 1),
        "branch3x3_2b": (384, 384, (3, 1), 1),
        "branch3x3dbl_1": (inputs, 448, ONE, 1),
        "branch3x3dbl_2": (448, 384, THREE, 1),
        "branch3x3dbl_3a": (384, 384, (1, 3), 1),
        "branch3x3dbl_3b": (384, 384, (3, 1), 1),
        "branch_pool": (inputs, 192, ONE, 1),
    }
    single = ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b"))
    double = ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b"))
    return Mixed(units, [("branch1x1",), single, double, (pooling, "branch_pool")])


class Inception(nn.Module):
    """The whole network, for pictures in [0, 1] of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, THREE, 2, pad=False)
        self.Conv2d_2a_3x3 = Unit(32, 32, THREE, pad=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, THREE)
        self.Conv2d_3b_1x1 = Unit(64, 80, ONE)
        self.Conv2d_4a_3x3 = Unit(80, 192, THREE, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_35(192, 32), block_35(256, 64), block_35(288, 64)
        self.Mixed_6a = block_35_to_17(288)
        self.Mixed_6b, self.Mixed_6c = block_17(128), block_17(160)
        self.Mixed_6d, self.Mixed_6e = block_17(160), block_17(192)
        self.Mixed_7a = block_17_to_8()
        self.Mixed_7b, self.Mixed_7c = block_8(1280, "mean"), block_8(2048, "max")
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> InceptionOutput:
        """Resized as pytorch-fid does: bilinear without antialiasing, to 299 x 299; then to [-1, 1]."""
        images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return self.body(images * 2 - 1)

    def body(self, x: Float[Tensor, "b 3 H W"]) -> InceptionOutput:
        """The network alone, for pictures of 299 x 299 in [-1, 1]."""
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for block in (
            *(self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c),
            *(self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c),
        ):
            x = block(x)
        features = x.mean(dim=(2, 3))
        return InceptionOutput(features, features @ self.fc.weight.T)
