"""Probe: a small classifier of what pictures show, one head for each factor, to judge pictures without other people's
networks.

Pre-activation residual blocks (He et al. 2016, https://arxiv.org/abs/1603.05027) with GroupNorm in place of BatchNorm:
it has no running statistics, which averaged weights would not fit. Features keep where in the picture things are, for
pictures of our data are centred: averaged over all cells, they tell few concepts of the emoji apart. What the style of
icons is made of, a palette and flat or shaded areas, those blocks hardly see; a histogram of colours and of steps
between neighbours tells it (docs/experiments.md, 2026-11-30).

Axes: b batch, H W pixels, c channels, h w cells, e features, f factors, k values of a factor.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one, not_negative
from dalle_pytorch.models.checks import check_pixels

GROUPS = 8
"""Of GroupNorm."""
STEPS = (0.004, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Bounds between kinds of steps from a pixel to its neighbour, of 1 = black to white; 0.004 is a level of 8 bits."""
UNKNOWN = -1
"""Label of a value that is no class of the probe, or of a factor that a picture has not."""


@dataclass(kw_only=True)
class ProbeConfig:
    """Sizes and classes of a probe."""

    image_size: int = 64
    """Side of the square picture in pixels; a multiple of 2 ** stages."""
    width: int = 16
    """Channels of the first stage, a multiple of 8; they double from stage to stage."""
    stages: int = 4
    """Each halves the resolution."""
    blocks: int = 1
    """Residual blocks of a stage."""
    cells: int = 4
    """The last stage is averaged to so many cells each way before it becomes features; 1 = over the whole picture."""
    num_features: int = 128
    """Width of the features."""
    colours: int = 0
    """Shades of each channel in the histogram of colours, which is of their cube; 0 = neither that of colours nor those
    of steps."""
    dropout: float = 0.2
    """Share of the features that training leaves out, in [0, 1)."""
    label_smoothing: float = 0.1
    """Share of a label that training spreads over all classes, in [0, 1)."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """Values of each factor; a training fills it from its data."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        at_least_one(self, "stages", "blocks", "image_size", "cells", "num_features")
        if self.image_size % 2**self.stages:
            raise UserError(f"image_size must be a multiple of 2 ** stages = {2**self.stages}, got {self.image_size}")
        if self.cells > (grid := self.image_size // 2**self.stages):
            raise UserError(f"cells must be at most image_size / 2 ** stages = {grid}, got {self.cells}")
        if self.width < GROUPS or self.width % GROUPS:
            raise UserError(f"width must be a multiple of {GROUPS}, got {self.width}")
        not_negative(self, "colours")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name, values in self.classes.items():
            if not re.fullmatch(r"\w+", name) or name == "all":
                raise UserError(f'factor {name!r} stands in names of numbers: use letters, digits, "_", and not "all"')
            if len(set(values)) != len(values) or len(values) < 2:
                raise UserError(f"classes.{name} must be two or more different values, got {values}")


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The sum of both."""
        return x + self.layers(x)


class Probe(nn.Module):
    """Pictures to features, and from these to the value of each factor.

    Args:
        config: sizes and classes.

    Raises:
        ValueError: no classes.
    """

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        if not config.classes:
            raise UserError("a probe needs classes: factors of two or more values each")
        self.config = config
        layers: list[nn.Module] = []
        before = 3
        for stage in range(config.stages):
            channels = config.width * 2**stage
            layers.append(nn.Conv2d(before, channels, 3, stride=2, padding=1))
            layers += [Block(channels) for _ in range(config.blocks)]
            before = channels
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.AdaptiveAvgPool2d(config.cells))
        self.to_features = nn.Linear(before * config.cells**2, config.num_features)
        if config.colours:
            self.palette = nn.Sequential(
                nn.Linear(config.colours**3 + 2 * (len(STEPS) + 1), 2 * config.num_features),
                nn.SiLU(),
                nn.Dropout(config.dropout),
                nn.Linear(2 * config.num_features, config.num_features),
            )
        self.dropout = nn.Dropout(config.dropout)
        self.heads = nn.ModuleList([nn.Linear(config.num_features, len(values)) for values in config.classes.values()])

    def encode_image(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Features of pictures in [0, 1], resized to ``image_size`` where they differ.

        Raises:
            ValueError: another number of channels, or pixels that are no floats in [0, 1].
        """
        check_pixels(images)
        if images.shape[1] != 3:
            raise ValueError(f"pictures of {images.shape[1]} channels given, a probe reads RGB")
        size = (self.config.image_size, self.config.image_size)
        if tuple(images.shape[2:]) != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
        features = self.to_features(self.trunk(images * 2 - 1).flatten(1))
        if not self.config.colours:
            return features
        return features + self.palette(histograms(images, self.config.colours).to(features.dtype))

    def forward(self, images: Float[Tensor, "b c H W"]) -> dict[str, Float[Tensor, "b _"]]:
        """Logits of each factor's values."""
        features = self.dropout(self.encode_image(images))
        return {name: head(features) for name, head in zip(self.config.classes, self.heads, strict=True)}

    def labels(self, factors: Sequence[Mapping[str, str]]) -> Int[Tensor, "b f"]:
        """Class of each picture's value of each factor; UNKNOWN where there is none."""
        known = [{value: place for place, value in enumerate(values)} for values in self.config.classes.values()]
        rows = [
            [
                places.get(row[name], UNKNOWN) if name in row else UNKNOWN
                for name, places in zip(self.config.classes, known, strict=True)
            ]
            for row in factors
        ]
        return torch.tensor(rows, dtype=torch.long).view(len(factors), len(known))

    def loss(self, images: Float[Tensor, "b c H W"], labels: Int[Tensor, "b f"]) -> Float[Tensor, ""]:
        """Mean over the factors of the cross entropy of their known labels, nats; a factor without any counts as 0."""
        losses = []
        for logits, own in zip(self(images).values(), labels.T, strict=True):
            total = F.cross_entropy(
                logits.float(), own, ignore_index=UNKNOWN, label_smoothing=self.config.label_smoothing, reduction="sum"
            )
            losses.append(total / (own != UNKNOWN).sum().clamp_min(1))
        return torch.stack(losses).mean()


def histograms(images: Float[Tensor, "b 3 H W"], colours: int) -> Float[Tensor, "b e"]:
    """Square roots of the shares of pixels of each colour, and of the steps to the right and downwards of each kind.

    Args:
        images: in [0, 1].
        colours: shades of each channel.

    Returns:
        fp32, e = colours ** 3 + 2 * (len(STEPS) + 1): the cube, red slowest; the steps to the right, those downwards,
        of all channels together, small ones first.
    """
    with torch.no_grad():
        images = images.float()
        shades = (images * colours).long().clamp(0, colours - 1)
        found = [shares((shades[:, 0] * colours + shades[:, 1]) * colours + shades[:, 2], colours**3)]
        bounds = torch.tensor(STEPS, device=images.device, dtype=torch.float32)
        for dim in (3, 2):
            steps = images.diff(dim=dim).abs().contiguous()
            found.append(shares(torch.bucketize(steps, bounds), len(STEPS) + 1))
        return torch.cat(found, dim=1).sqrt()


def shares(kinds: Int[Tensor, "b ..."], count: int) -> Float[Tensor, "b k"]:
    """How many of a picture's values are 0, 1, …, ``count`` - 1, of 1."""
    flat = kinds.flatten(1)
    ones = torch.ones(flat.shape, device=flat.device, dtype=torch.float32)
    counts = torch.zeros(len(flat), count, device=flat.device, dtype=torch.float32).scatter_add_(1, flat, ones)
    return counts / flat.shape[1]
