"""OpenAI's dVAE, the image tokenizer of the DALL-E paper: 8192 codes, a picture is an eighth of its side in tokens.

Paper: Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, sections 2.1, A.1 and A.3. The layers are those of the
released network, which the package ``dall-e`` 0.1 describes (dall_e/encoder.py, decoder.py, utils.py).

Without gradients on a CPU the convolutions are oneDNN's own, see `Conv2d`.

Axes: b batch, c channels, H W pixels, h w token grid, n = h * w, k codebook_size, i inputs and o outputs of a layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.models.linear import onednn_computes

GROUPS = 4  # of blocks; the resolution changes between them, so that 8 x 8 pixels share a token
LOGIT_LAPLACE_EPS = 0.1  # section A.3
PIXELS = 2**18  # computed at a time: about 1 GB of features in fp32


@dataclass(kw_only=True)
class OpenAIDVAEConfig:
    """Sizes of an OpenAIDVAE; the defaults are the released network's."""

    image_size: int = 256
    """Side of the square picture in pixels, a multiple of 8; weights fit any."""
    hidden_dim: int = 256
    """Channels at full resolution, a multiple of 4; they double with each halving of it."""
    init_dim: int = 128
    """Width of a code vector."""
    num_blocks: int = 2
    """Residual blocks in each of the four groups of encoder and decoder."""
    codebook_size: int = 8192
    """Number of codes."""
    channels: int = 3
    """Picture channels."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        at_least_one(self, "image_size", "hidden_dim", "init_dim", "num_blocks", "codebook_size", "channels")
        for name, factor in (("image_size", 2 ** (GROUPS - 1)), ("hidden_dim", 4)):
            if getattr(self, name) % factor:
                raise UserError(f"{name} ({getattr(self, name)}) must be a multiple of {factor}")


class Packed(NamedTuple):
    """Weights laid out for oneDNN, and what they were made from."""

    weight: Tensor
    bias: Tensor
    parameters: tuple[Tensor, Tensor]
    versions: tuple[int, int]
    """How often the parameters had been changed in place."""


class Conv2d(nn.Conv2d):
    """A convolution that keeps the picture's size, and what follows it in a block: gain, sum and ReLU.

    In eval mode, without gradients, on a CPU it is one call of oneDNN: the sum and the ReLU are done on the way, and
    the weights are laid out for oneDNN at the first use and kept, where torch does it at every call
    (benchmarks/codec.py). This second copy of the weights is made anew once they have changed (changes through
    ``.data`` go unnoticed), and is neither saved nor moved.

    Args:
        gain: factor of the result.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, gain: float = 1.0) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.gain = gain
        self.packed: Packed | None = None

    def reset_parameters(self) -> None:
        """N(0, 1 / inputs), no biases (dall_e/utils.py)."""
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, input: Float[Tensor, "b i h w"], relu: bool = False, onto: Float[Tensor, "b o h w"] | None = None
    ) -> Float[Tensor, "b o h w"]:
        """``gain * convolution``, added to ``onto``, which may be overwritten, and then rectified."""
        if self._onednn_does(input):
            return self._onednn(input, relu, onto)
        out = super().forward(input)
        if self.gain != 1:
            out = out * self.gain
        if onto is not None:
            out = onto + out
        return F.relu(out) if relu else out

    def _onednn_does(self, x: Tensor) -> bool:
        """Whether nothing but the numbers is asked for, and oneDNN has kernels for them."""
        weight = self.weight
        plain = type(x) is Tensor and type(weight) is nn.Parameter and not weight.is_inference()
        frozen = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        return plain and frozen and x.device.type == weight.device.type == "cpu" and onednn_computes(x.dtype)

    def _onednn(self, x: Tensor, relu: bool, onto: Tensor | None) -> Tensor:
        weight, bias, *_ = self._pack(x)
        layout = list(self.padding), [1, 1], [1, 1], 1  # padding, stride, dilation, groups
        if onto is None:
            attribute = "relu" if relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *layout, attribute, [], "")
        attribute = "relu" if relu else None
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            onto, x, weight, bias, *layout, "add", 1.0, attribute, [], ""
        )

    def _pack(self, x: Tensor) -> Packed:
        """Weight and bias with the gain in them, laid out for pictures of this size."""
        assert self.bias is not None
        parameters = self.weight, self.bias
        versions = self.weight._version, self.bias._version
        packed = self.packed
        same = packed is not None and all(a is b for a, b in zip(packed.parameters, parameters, strict=True))
        if packed is None or not same or packed.versions != versions:
            # a gain of 1/64, the released network's, changes no digit
            weight, bias = (p.detach() if self.gain == 1 else p.detach() * self.gain for p in parameters)
            layout = list(self.padding), [1, 1], [1, 1], 1
            weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *layout, x.shape)
            packed = self.packed = Packed(weight, bias, parameters, versions)
        return packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Conv2d":
        self.packed = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, object]:
        """Without the second copy of the weights, for copies and pickles."""
        return {**self.__dict__, "packed": None}


class Block(nn.Module):
    """Four convolutions, each after a ReLU, added to the input.

    Args:
        source: input channels.
        target: output channels; the convolutions between have a quarter of them.
        kernels: kernel sizes of the four.
        gain: factor of what is added (1 / layers ** 2: section 2.1 wants a small constant).
    """

    def __init__(self, source: int, target: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        hidden = target // 4
        self.id_path = Conv2d(source, target, 1) if source != target else None
        self.conv_1 = Conv2d(source, hidden, kernels[0])
        self.conv_2 = Conv2d(hidden, hidden, kernels[1])
        self.conv_3 = Conv2d(hidden, hidden, kernels[2])
        self.conv_4 = Conv2d(hidden, target, kernels[3], gain=gain)

    def forward(self, x: Float[Tensor, "b i h w"], *, upsample: bool = False) -> Float[Tensor, "b o H W"]:
        """The block's output for ``x``, which may be overwritten.

        Args:
            x: features.
            upsample: double the resolution of ``x`` first. The first convolution must be 1 x 1: it and the one around
                the block give the same before the doubling as after it, at a quarter of the work.
        """
        hidden = self.conv_1(F.relu(x), relu=True)
        out = x if self.id_path is None else self.id_path(x)
        if upsample:
            hidden, out = (F.interpolate(part, scale_factor=2.0) for part in (hidden, out))
        hidden = self.conv_3(self.conv_2(hidden, relu=True), relu=True)
        return self.conv_4(hidden, onto=out)


class Group(nn.ModuleDict):
    """Blocks of one resolution, numbered from 1 as in OpenAI's files.

    Args:
        source: input channels.
        target: output channels.
        kernels: kernel sizes in a block.
        num_blocks: number of blocks.
    """

    def __init__(self, source: int, target: int, kernels: tuple[int, int, int, int], num_blocks: int) -> None:
        gain = 1 / (GROUPS * num_blocks) ** 2
        sources = [source, *[target] * (num_blocks - 1)]
        super().__init__({str(n): Block(width, target, kernels, gain) for n, width in enumerate(sources, start=1)})

    def forward(self, x: Float[Tensor, "b i h w"], *, upsample: bool = False) -> Float[Tensor, "b o H W"]:
        """All blocks, of features whose resolution may be doubled first."""
        for number, block in self.items():
            x = block(x, upsample=upsample and number == "1")
        return x


def make_groups(widths: list[int], kernels: tuple[int, int, int, int], num_blocks: int) -> nn.ModuleDict:
    """The groups, numbered from 1 likewise; ``widths`` are the channels of the input and of each."""
    pairs = enumerate(pairwise(widths), start=1)
    return nn.ModuleDict({str(n): Group(source, target, kernels, num_blocks) for n, (source, target) in pairs})


class Encoder(nn.Module):
    """Pixels to code logits."""

    def __init__(self, config: OpenAIDVAEConfig) -> None:
        super().__init__()
        widths = [config.hidden_dim * 2**group for group in range(GROUPS)]
        self.input = Conv2d(config.channels, widths[0], 7)
        self.groups = make_groups([widths[0], *widths], (3, 3, 3, 1), config.num_blocks)
        self.output = Conv2d(widths[-1], config.codebook_size, 1)

    def forward(self, pixels: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        """Code logits of pixels in [eps, 1 - eps]."""
        x = self.input(pixels.contiguous(memory_format=torch.channels_last))
        for number, group in self.groups.items():
            x = group(x if number == "1" else halve(x))
        return self.output(F.relu_(x))


class Decoder(nn.Module):
    """Codes to the maps of the likelihood: mu of each channel, then ln b of each."""

    def __init__(self, config: OpenAIDVAEConfig) -> None:
        super().__init__()
        widths = [config.hidden_dim * 2**group for group in reversed(range(GROUPS))]
        self.input = CodeVectors(config.codebook_size, config.init_dim)
        self.groups = make_groups([config.init_dim, *widths], (1, 3, 3, 3), config.num_blocks)
        self.output = Conv2d(widths[-1], 2 * config.channels, 1)

    def forward(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b maps H W"]:
        """Maps of codes on their grid."""
        x = self.input(codes).permute(0, 3, 1, 2)  # channels last in memory
        for number, group in self.groups.items():
            x = group(x, upsample=number != "1")
        return self.output(F.relu_(x))


class CodeVectors(nn.Module):
    """Rows of a table and a bias: what a 1 x 1 convolution makes of one-hot codes."""

    def __init__(self, codebook_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(codebook_size, dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight, std=codebook_size**-0.5)

    def forward(self, codes: Int[Tensor, "*b"]) -> Float[Tensor, "*b i"]:
        """Vectors of codes."""
        return F.embedding(codes, self.weight) + self.bias


def halve(x: Float[Tensor, "b i H W"]) -> Float[Tensor, "b i h w"]:
    """Maxima of 2 x 2 pixels, like ``F.max_pool2d``, which would also write down where they were."""
    x = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(x[..., ::2], x[..., 1::2])


class OpenAIDVAE(ImageTokenizer):
    """OpenAI's dVAE: a frozen image tokenizer; both directions run without gradients.

    Args:
        config: sizes.

    Source:
        Ramesh et al. 2021, section 2.1; dall_e/encoder.py and decoder.py of the package ``dall-e`` 0.1. Deviations: the
        decoder's first layer is a table of vectors, and a block's 1 x 1 convolutions come before the upsampling.
    """

    def __init__(self, config: OpenAIDVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.grid_size = config.image_size, config.image_size // 2 ** (GROUPS - 1)
        self.codebook_size, self.channels = config.codebook_size, config.channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def encode_logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        """Code logits of every grid position, from pictures in [0, 1], in the type of the weights."""
        self.check_images(images)
        pixels = (1 - 2 * LOGIT_LAPLACE_EPS) * images.float() + LOGIT_LAPLACE_EPS
        return self.encoder(pixels.to(self.encoder.input.weight.dtype))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n"]:
        """Most likely code of every position; a large batch is worked through in parts."""
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._most_likely(part) for part in images.split(self.together)])

    @torch.no_grad()
    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Pictures in [0, 1], float32; a large batch is worked through in parts."""
        self.check_tokens(image_tokens)
        with torch.autocast(image_tokens.device.type, enabled=False):
            return torch.cat([self._mean(part) for part in image_tokens.split(self.together)])

    @property
    def together(self) -> int:
        """Pictures computed at a time."""
        return max(1, PIXELS // self.image_size**2)

    def _most_likely(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n"]:
        logits = self.encode_logits(images).permute(0, 2, 3, 1)
        return logits.max(dim=-1).indices.flatten(1)  # in bf16 five times as fast as argmax

    def _mean(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """What the likelihood's location maps say; its scale maps are ignored (section A.3)."""
        maps = self.decoder(rearrange(image_tokens, "b (h w) -> b h w", h=self.grid_size))
        pixels = (torch.sigmoid(maps[:, : self.channels].float()) - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS)
        return pixels.clamp(0, 1).contiguous()
