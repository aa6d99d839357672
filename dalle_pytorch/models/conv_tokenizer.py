"""What the convolutional image tokenizers share: sizes, encoder, decoder, likelihood of pictures.

The layers are those of DALLE-pytorch 1.6.6 (strided 4 x 4 convolutions, residual blocks at the bottleneck), so that its
users find the sizes they know. Strides other than 2 give grids between its powers of two.

Axes: b batch, c channels, H W pixels, h w token grid, d channels of a layer.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one, not_negative
from dalle_pytorch.models.image_tokenizer import TrainableTokenizer

LIKELIHOODS = ("mse", "l1", "smooth_l1", "logit_laplace")
MAX_LOG_B = 5.0
"""Bound of the logit-Laplace's ln b."""
LOGIT_LAPLACE_EPS = 0.1  # section A.3: keeps pixels away from 0 and 1, where the density diverges


@dataclass(kw_only=True)
class ConvConfig:
    """Sizes and likelihood of encoder and decoder."""

    image_size: int = 64
    """Side of the square picture in pixels; a multiple of 2 ** num_layers, any with ``strides``."""
    num_layers: int = 3
    """Halvings of the resolution: grid_size = image_size / 2 ** num_layers."""
    strides: list[int] = field(default_factory=list)
    """Strides of the layers, finest first, in place of halvings; [] = halvings. grid_size = image_size / their product,
    rounded up; the picture's edge is repeated as far as the last tokens reach. [2, 3]: 11 x 11 tokens of 64 pixels."""
    codebook_size: int = 1024
    """Number of codes (the paper: 8192)."""
    codebook_dim: int = 256
    """Width of a code vector."""
    hidden_dim: int = 128
    """Channels of the convolutions."""
    num_resnet_blocks: int = 2
    """Residual blocks at the bottleneck, in the encoder and again in the decoder; 0 = none."""
    fine_blocks: int = 0
    """Residual blocks at each finer resolution that has features, in the encoder and again in the decoder."""
    taper: bool = False
    """Halve the channels with every doubling of the resolution; cheaper: the finest layers hold most of the work."""
    channels: int = 3
    """Picture channels, 1 to 4."""
    likelihood: str = "mse"
    """Reconstruction term: "mse", "l1", "smooth_l1" (in [-1, 1] units) or "logit_laplace" (nats)."""
    mean: list[float] = field(default_factory=lambda: [0.5])
    """Subtracted from the picture, per channel or one for all."""
    std: list[float] = field(default_factory=lambda: [0.5])
    """Divides the picture after ``mean``, per channel or one for all."""

    def __post_init__(self) -> None:
        """Validate; every message names the field and the values.

        Raises:
            ValueError: a field is out of range.
        """
        at_least_one(self, "image_size", "num_layers", "codebook_size", "codebook_dim", "hidden_dim")
        if min(self.strides, default=2) < 2:
            raise UserError(f"strides must be 2 or more each, got {self.strides}")
        if not self.strides and self.image_size % 2**self.num_layers:
            raise UserError(
                f"image_size ({self.image_size}) must be a multiple of 2 ** num_layers ({2**self.num_layers})"
            )
        if not 1 <= self.channels <= 4:
            raise UserError(f"channels must be 1 to 4, got {self.channels}")
        halvings = len(self.scales) - 1
        if self.taper and self.hidden_dim % 2**halvings:
            raise UserError(
                f"taper halves the channels {halvings} times: hidden_dim ({self.hidden_dim}) must be a "
                f"multiple of {2**halvings}"
            )
        not_negative(self, "num_resnet_blocks", "fine_blocks")
        if self.likelihood not in LIKELIHOODS:
            raise UserError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {self.likelihood!r}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise UserError(f"{name} must have 1 or {self.channels} values, got {getattr(self, name)}")
        if min(self.std) <= 0:
            raise UserError(f"std ({self.std}) must be above 0")

    @property
    def scales(self) -> list[int]:
        """Stride of each layer, finest first."""
        return list(self.strides) or [2] * self.num_layers

    @property
    def grid_size(self) -> int:
        """Token rows."""
        return math.ceil(self.image_size / math.prod(self.scales))


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions and a 1 x 1, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(channels, channels, 1)
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Same shape in and out."""
        return self.last(self.net(x)) + x


def widths(config: ConvConfig) -> list[int]:
    """Channels of each layer, finest first."""
    last = len(config.scales) - 1
    return [config.hidden_dim >> (last - layer) if config.taper else config.hidden_dim for layer in range(last + 1)]


def make_encoder(config: ConvConfig, outputs: int) -> nn.Sequential:
    """Pixels to the quantiser's ``outputs`` channels."""
    layers: list[nn.Module] = []
    source = config.channels
    for place, (target, stride) in enumerate(zip(widths(config), config.scales, strict=True), start=1):
        layers += [nn.Conv2d(source, target, stride + 2, stride=stride, padding=1), nn.ReLU()]
        source = target
        blocks = config.num_resnet_blocks if place == len(config.scales) else config.fine_blocks
        layers += [ResBlock(source) for _ in range(blocks)]
    # 1 x 1 on both sides of the quantiser: a small receptive field there generalises better (Ramesh et al. 2021, 2.1)
    return nn.Sequential(*layers, nn.Conv2d(source, outputs, 1))


def make_decoder(config: ConvConfig) -> nn.Sequential:
    """Code vectors to pixels, or to the maps of the likelihood."""
    maps = config.channels * (2 if config.likelihood == "logit_laplace" else 1)  # mu and ln b
    layers: list[nn.Module] = []
    source = config.codebook_dim
    if config.num_resnet_blocks:  # without blocks the first upsampling reads the codes itself, as in DALLE-pytorch
        layers += [nn.Conv2d(source, config.hidden_dim, 1)]
        source = config.hidden_dim
        layers += [ResBlock(source) for _ in range(config.num_resnet_blocks)]
    targets = [maps, *widths(config)[:-1]] if config.taper else [config.hidden_dim] * len(config.scales)
    for place, (target, stride) in reversed(list(enumerate(zip(targets, config.scales, strict=True)))):
        layers += [nn.ConvTranspose2d(source, target, stride + 2, stride=stride, padding=1), nn.ReLU()]
        source = target
        if place or not config.taper:  # a tapering decoder ends with pixels
            layers += [ResBlock(source) for _ in range(config.fine_blocks)]
    return nn.Sequential(*layers[:-1]) if config.taper else nn.Sequential(*layers, nn.Conv2d(source, maps, 1))


class ConvTokenizer(TrainableTokenizer):
    """Encoder and decoder; what lies between them is the subclass's.

    Args:
        config: sizes and likelihood.
        outputs: channels that the encoder gives the quantiser.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ConvConfig, outputs: int) -> None:
        super().__init__()
        self.image_size = config.image_size
        self.grid_size = config.grid_size
        excess = self.grid_size * math.prod(config.scales) - self.image_size
        self.margin = (excess // 2, excess - excess // 2)
        self.codebook_size = config.codebook_size
        self.channels, self.likelihood = config.channels, config.likelihood
        self.encoder, self.decoder = make_encoder(config, outputs), make_decoder(config)
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1), persistent=False)

    def init_weights(self) -> None:
        """He initialisation, so that the first code logits tell pictures apart.

        Residual branches start at 0.3 of their scale and the output at half, both to keep the start calm (the paper
        scales residuals by a constant as well, section A.1).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                fan_in = module.weight[0].numel()
                if isinstance(module, nn.ConvTranspose2d):  # kernel 4 and stride 2 sum 2 x 2 inputs into each output
                    fan_in = module.in_channels * math.prod(module.kernel_size) / math.prod(module.stride)
                nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ResBlock):
                    module.last.weight.mul_(0.3)
            for parameter in self.decoder[-1].parameters():
                parameter.mul_(0.5)

    def encoded(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        """The encoder's output, from images in [0, 1] of any float type."""
        self.check_images(images)
        images = images.to(self.mean.dtype)
        return self.encoder(F.pad((images - self.mean) / self.std, (*self.margin, *self.margin), mode="replicate"))

    def decoded(self, vectors: Float[Tensor, "b d h w"]) -> Float[Tensor, "b maps H W"]:
        """The decoder's output, the size of the picture."""
        output, first, size = self.decoder(vectors), self.margin[0], self.image_size
        return output[..., first : first + size, first : first + size] if any(self.margin) else output

    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Images in [0, 1]."""
        self.check_tokens(image_tokens)
        return self.to_pixels(self.output(image_tokens))

    @property
    def decoding_parts(self) -> list[nn.Module]:
        """The decoder."""
        return [self.decoder]

    def to_pixels(self, output: Float[Tensor, "b maps H W"], *, clamp: bool = True) -> Float[Tensor, "b c H W"]:
        """Decoder output to images; the scale map of the logit-Laplace is ignored (section A.3)."""
        if self.likelihood == "logit_laplace":
            eps = LOGIT_LAPLACE_EPS
            pixels = (torch.sigmoid(output[:, : self.channels]) - eps) / (1 - 2 * eps)
        else:
            pixels = output * self.std + self.mean
        return pixels.clamp(0, 1) if clamp else pixels

    def reconstruction_error(
        self, output: Float[Tensor, "b maps H W"], images: Float[Tensor, "b c H W"]
    ) -> Float[Tensor, ""]:
        """Mean over subpixels of the negative log-likelihood, up to constants."""
        if self.likelihood == "logit_laplace":
            return logit_laplace_nll(output, images)
        return pixel_error(self.likelihood, output, (images - self.mean) / self.std)


def pixel_error(
    likelihood: str, output: Float[Tensor, "b c H W"], target: Float[Tensor, "b c H W"]
) -> Float[Tensor, ""]:
    """Mean error of pixels: "mse", "l1" or "smooth_l1"."""
    losses = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
    return losses[likelihood](output, target)


class _Bounded(torch.autograd.Function):
    """Clamped to [-limit, limit]; a gradient that leads back into that range is kept, where a clamp's would be 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        """The clamp."""
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(-limit, limit)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Nothing where a step would go on outwards."""
        (x,) = ctx.saved_tensors
        outwards = (x.abs() > ctx.limit) & (x * gradient < 0)
        return gradient.masked_fill(outwards, 0), None


def logit_laplace_nll(output: Float[Tensor, "b maps H W"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, ""]:
    """Mean negative log-density of pictures under the logit-Laplace, nats per subpixel.

    Args:
        output: decoder maps, mu of each channel then ln b of each.
        images: pictures in [0, 1]; squeezed into [eps, 1 - eps] here.

    Source:
        Ramesh et al. 2021, section A.3: ln(2b) + ln(x(1 - x)) + |logit(x) - mu| / b.
    """
    mu, log_b = output.chunk(2, dim=1)
    # ln b is bounded: exact black or white (most of an icon) would drive b to 0 and the density to infinity
    log_b = _Bounded.apply(log_b, MAX_LOG_B)
    x = images * (1 - 2 * LOGIT_LAPLACE_EPS) + LOGIT_LAPLACE_EPS
    nll = math.log(2) + log_b + (x * (1 - x)).log() + (x.logit() - mu).abs() * (-log_b).exp()
    return nll.mean()
