"""Sizes and layers of the VQGAN in vqgan.py: encoder and decoder, named as in taming-transformers.

Source: CompVis/taming-transformers, taming/modules/diffusionmodules/model.py.

Axes: b batch, c channels, H W pixels, h w token grid, z z_channels, i o layer channels.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.models.quantizers import CODEBOOKS, CodebookConfig

QUANTIZERS = ("vq", "gumbel", *CODEBOOKS)
LIKELIHOODS = ("l1", "mse", "smooth_l1")
PIXEL_RANGES = ("minus_one_to_one", "zero_to_one")


@dataclass(kw_only=True)
class VQGANConfig(CodebookConfig):
    """Sizes of a VQGAN; the defaults are those of taming's f16 with 16384 codes."""

    image_size: int = 256
    """Side of the square picture in pixels; a multiple of 2 ** (levels - 1). The weights fit any."""
    channels: int = 3
    """Picture channels, in and out."""
    ch: int = 128
    """Channels of the finest level per unit of ``ch_mult``; a multiple of ``norm_groups`` with every entry of it."""
    ch_mult: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])
    """Width of every level, finest first, in units of ``ch``; between two levels the resolution is halved."""
    num_res_blocks: int = 2
    """Residual blocks of a level of the encoder; the decoder has one more."""
    attention_levels: list[int] = field(default_factory=lambda: [4])
    """Levels with attention after every residual block, 0 = finest; the middle always has one."""
    z_channels: int = 256
    """Channels between encoder and codes, and between codes and decoder."""
    embed_dim: int = 256
    """Width of a code vector."""
    codebook_size: int = 16384
    """Number of codes."""
    quantizer: str = "vq"
    """"vq": the code next to the encoder's output, learnt by gradients; "gumbel": the largest of logits; or a codebook
    of models/quantizers.py: "ema", "fsq", "ibq", "lfq" or "bsq"."""
    likelihood: str = "l1"
    """Error of pixels in training: "l1", "mse" or "smooth_l1", in units of ``pixel_range``."""
    normalize_codes: bool = False
    """Compare and decode codes at length 1, as LlamaGen does; "vq" only."""
    pixel_range: str = "minus_one_to_one"
    """Pixels that the network was trained on: "minus_one_to_one", or "zero_to_one" (DALL·E mini)."""
    norm_groups: int = 32
    """Groups of every GroupNorm, 32 in all published models. Narrow networks need fewer: where a group is one channel,
    the mean of a channel is lost, and with it the colour of an image."""
    norm_eps: float = 1e-6
    """Added to the variance in every GroupNorm; min-dalle decodes with 1e-5."""
    encoder: bool = True
    """False: the decoder alone, as in min-dalle's files; ``encode`` is refused."""

    def __post_init__(self) -> None:
        """Validate; every message names the field and the values.

        Raises:
            ValueError: a field is out of range.
        """
        if self.quantizer not in QUANTIZERS:
            raise UserError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        self.check_codebook()
        at_least_one(
            self, "image_size", "channels", "ch", "num_res_blocks", "z_channels", "embed_dim", "codebook_size",
            "norm_groups",
        )  # fmt: skip
        groups = self.norm_groups
        if not self.ch_mult or min(self.ch_mult) < 1 or any(self.ch * mult % groups for mult in self.ch_mult):
            raise UserError(
                f"ch ({self.ch}) times every one of ch_mult ({self.ch_mult}) must be a multiple of norm_groups "
                f"({groups})"
            )
        if self.encoder and self.ch % groups:
            raise UserError(f"ch must be a multiple of norm_groups ({groups}), got {self.ch}")
        if self.image_size % self.reduction:
            raise UserError(
                f"image_size ({self.image_size}) must be a multiple of {self.reduction}: "
                f"ch_mult ({self.ch_mult}) has {len(self.ch_mult) - 1} halvings"
            )
        if not set(self.attention_levels) <= set(range(len(self.ch_mult))):
            raise UserError(
                f"attention_levels ({self.attention_levels}) must be levels of ch_mult, 0 to {len(self.ch_mult) - 1}"
            )
        for name, choices in (("pixel_range", PIXEL_RANGES), ("likelihood", LIKELIHOODS)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.normalize_codes and self.quantizer != "vq":
            raise UserError(f"normalize_codes needs quantizer 'vq', got {self.quantizer!r}")
        if self.norm_eps <= 0:
            raise UserError(f"norm_eps must be above 0, got {self.norm_eps}")

    @property
    def reduction(self) -> int:
        """Pixels per token, along a side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of every level, finest first."""
        return [self.ch * mult for mult in self.ch_mult]


class Encoder(nn.Module):
    """Pixels to latents: levels that halve the resolution, and the middle."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv(config.channels, config.ch)
        self.down = nn.ModuleList()
        for level, (source, target) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            self.down.append(Down(config, level, source, target))
        self.mid = Middle(widths[-1], config)
        self.norm_out = norm(widths[-1], config)
        self.conv_out = conv(widths[-1], config.z_channels)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b z h w"]:
        """Latents of pixels in the model's range."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """Latents to pixels: the middle, and levels that double the resolution, the coarsest (the last) first."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = conv(config.z_channels, widths[-1])
        self.mid = Middle(widths[-1], config)
        self.up = nn.ModuleList()
        for level, (target, source) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            self.up.append(Up(config, level, source, target))
        self.norm_out = norm(widths[0], config)
        self.conv_out = conv(widths[0], config.channels)

    def forward(self, x: Float[Tensor, "b z h w"]) -> Float[Tensor, "b c H W"]:
        """Pixels in the model's range, which they may leave a little."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class Level(nn.Module):
    """Residual blocks of one resolution, with attention after each where the level has it."""

    def __init__(self, config: VQGANConfig, level: int, source: int, target: int, num_blocks: int) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for index in range(num_blocks):
            self.block.append(ResBlock(target if index else source, target, config))
            if level in config.attention_levels:
                self.attn.append(Attention(target, config))

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        """The same resolution in and out."""
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return x


class Down(Level):
    """A level of the encoder; all but the coarsest halve the resolution at their end."""

    def __init__(self, config: VQGANConfig, level: int, source: int, target: int) -> None:
        super().__init__(config, level, source, target, config.num_res_blocks)
        coarsest = level == len(config.ch_mult) - 1
        self.downsample = nn.Identity() if coarsest else Downsample(target)

    def forward(self, x: Float[Tensor, "b i H W"]) -> Float[Tensor, "b o h w"]:
        """Half the resolution, but for the coarsest level."""
        return self.downsample(super().forward(x))


class Up(Level):
    """A level of the decoder; all but the finest double the resolution at their end."""

    def __init__(self, config: VQGANConfig, level: int, source: int, target: int) -> None:
        super().__init__(config, level, source, target, config.num_res_blocks + 1)
        self.upsample = Upsample(target) if level else nn.Identity()

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o H W"]:
        """Twice the resolution, but for the finest level."""
        return self.upsample(super().forward(x))


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, width: int, config: VQGANConfig) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, config)
        self.attn_1 = Attention(width, config)
        self.block_2 = ResBlock(width, width, config)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b i h w"]:
        """Same shape in and out."""
        return self.block_2(self.attn_1(self.block_1(x)))


class ResBlock(nn.Module):
    """Two normed convolutions added to the input; a 1 x 1 one fits the input to another width."""

    def __init__(self, source: int, target: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(source, config), conv(source, target)
        self.norm2, self.conv2 = norm(target, config), conv(target, target)
        self.nin_shortcut = nn.Identity() if source == target else nn.Conv2d(source, target, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h w"]:
        """Same resolution in and out."""
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return h.add_(self.nin_shortcut(x))


class Attention(nn.Module):
    """One head over all positions, added to the input."""

    def __init__(self, width: int, config: VQGANConfig) -> None:
        super().__init__()
        self.norm = norm(width, config)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b i h w"]:
        """Same shape in and out."""
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b i h w -> b 1 (h w) i") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj_out(rearrange(h, "b 1 (h w) i -> b i h w", h=x.shape[2])).add_(x)


class Downsample(nn.Module):
    """Half the resolution by a strided convolution, with a zero row and column at the far sides only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "b i H W"]) -> Float[Tensor, "b i h w"]:
        """Half the sides."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: every position four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv(width, width)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b i H W"]:
        """Twice the sides."""
        if torch.compiler.is_compiling():  # Inductor of torch 2.13 loses the gradient of interpolate in bfloat16
            return self.conv(repeat(x, "b i h w -> b i (h r) (w s)", r=2, s=2))
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def conv(source: int, target: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the resolution."""
    return nn.Conv2d(source, target, 3, padding=1)


def norm(width: int, config: VQGANConfig) -> nn.GroupNorm:
    """GroupNorm of a width."""
    return nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)


def norm_silu(layer: nn.GroupNorm, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b i h w"]:
    """GroupNorm, then SiLU; in the norm's own memory where no gradient needs it."""
    h = layer(x)
    return F.silu(h, inplace=not h.requires_grad)


def in_fast_layout(x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b i h w"]:
    """Channels last on a CPU without gradients, where all layers here work in it.

    Elsewhere GroupNorm would undo it at every step, and its backward pass in bfloat16 is nine times slower in it.
    """
    channels_last = x.device.type == "cpu" and not torch.is_grad_enabled()
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
