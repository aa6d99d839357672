"""The ResNet image tower of OpenAI's CLIP (RN50, RN101, RN50x4, RN50x16, RN50x64).

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2.4. Against He's ResNet: a stem of three
convolutions, an average pool before every convolution that would have a stride (Zhang 2019, arXiv:1904.11486), and
attention in place of the last average. The arithmetic is that of ``ModifiedResNet`` in clip/model.py of
github.com/openai/CLIP.

Axes: b batch, c channels, H W pixels, h w cells of a feature map, t positions, d width, e features.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.models.clip_towers import attention
from dalle_pytorch.models.linear import Linear

EXPANSION = 4
"""Output channels of a residual block for each of its inner ones."""


class FrozenBatchNorm(nn.Module):
    """Batch norm with its statistics at rest: a scorer must not learn from what it scores."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The normalised map; scale and shift are worked out in fp32."""
        scale = self.weight.float() * (self.running_var.float() + 1e-5).rsqrt()  # 1e-5: nn.BatchNorm2d's default
        shift = self.bias.float() - self.running_mean.float() * scale
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


class Bottleneck(nn.Module):
    """A residual block of three convolutions; a stride is an average pool."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * inner
        self.stride = stride
        self.conv1, self.norm1 = nn.Conv2d(channels, inner, 1, bias=False), FrozenBatchNorm(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), FrozenBatchNorm(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, out, 1, bias=False), FrozenBatchNorm(out)
        shortcut = stride > 1 or channels != out
        self.shortcut_conv = nn.Conv2d(channels, out, 1, bias=False) if shortcut else None
        self.shortcut_norm = FrozenBatchNorm(out) if shortcut else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d H W"]:
        """The sum of both paths."""
        inner = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        if self.stride > 1:
            inner, x = F.avg_pool2d(inner, self.stride), F.avg_pool2d(x, self.stride)
        if self.shortcut_conv is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut_conv(x))
        return F.relu(self.norm3(self.conv3(inner)) + x)


class MapPool(nn.Module):
    """Attention over the cells of the last map and their mean, which asks."""

    def __init__(self, cells: int, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(cells + 1, width) * width**-0.5)
        self.q, self.k, self.v = Linear(width, width), Linear(width, width), Linear(width, width)
        self.out = Linear(width, embed_dim)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b e"]:
        """What the mean finds."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positions.to(x.dtype)
        return self.out(attention(self.q(x[:, :1]), self.k(x), self.v(x), self.heads, causal=False))[:, 0]


class ModifiedResNet(nn.Module):
    """An image tower of residual blocks.

    Args:
        stages: blocks in each of the four stages; every stage but the first halves the map.
        width: channels after the stem; the last map has 32 times as many.
        image_size: side of the picture in pixels, a multiple of 32.
        heads: of the attention at the end.
        embed_dim: features.
    """

    def __init__(self, *, stages: list[int], width: int, image_size: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.norm1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), FrozenBatchNorm(half)
        self.conv2, self.norm2 = nn.Conv2d(half, half, 3, padding=1, bias=False), FrozenBatchNorm(half)
        self.conv3, self.norm3 = nn.Conv2d(half, width, 3, padding=1, bias=False), FrozenBatchNorm(width)
        self.stages = nn.ModuleList()
        channels = width
        for stage, blocks in enumerate(stages):
            inner = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            inputs = [channels] + [EXPANSION * inner] * (blocks - 1)
            self.stages.append(nn.Sequential(*(Bottleneck(c, inner, s) for c, s in zip(inputs, strides, strict=True))))
            channels = EXPANSION * inner
        self.pool = MapPool((image_size // 32) ** 2, channels, heads, embed_dim)

    def forward(self, pixels: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Features, not yet of unit length, of normalised pixels."""
        x = F.relu(self.norm1(self.conv1(pixels.to(self.conv1.weight.dtype))))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        for stage in self.stages:
            x = stage(x)
        return self.pool(x)
