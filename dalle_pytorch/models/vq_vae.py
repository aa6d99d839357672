"""VQVAE: stage one with other codebooks than the Gumbel-softmax's, in the same encoder and decoder.

Axes: b batch, c channels, H W pixels, n image tokens in raster order, d codebook_dim.
"""

import math
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError, not_negative
from dalle_pytorch.models.conv_tokenizer import ConvConfig, ConvTokenizer
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.quantizers import LikeliestCode, NearestCode, Quantizer, ScalarGrid, to_grid, to_sequence


@dataclass(kw_only=True)
class NarrowConfig(ConvConfig):
    """Sizes and likelihood; code vectors are narrow, as ViT-VQGAN advises (quantizers.NearestCode)."""

    codebook_dim: int = 16
    """Width of a code vector."""


@dataclass(kw_only=True)
class VQConfig(NarrowConfig):
    """A VQVAE whose codes are learnt vectors; the nearest is taken, and it follows a moving average."""

    decay: float = 0.99
    """Of the moving averages, in (0, 1)."""
    idle: float = 0.1
    """Codes that stand for fewer vectors of a batch, on average, are put on one of them."""
    commitment: float = 0.25
    """Weight of the distance from the encoder's vectors to their codes."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        super().__post_init__()
        if not 0 < self.decay < 1:
            raise UserError(f"decay must lie in (0, 1), got {self.decay}")
        not_negative(self, "idle", "commitment")


@dataclass(kw_only=True)
class FSQConfig(NarrowConfig):
    """A VQVAE whose codes are a grid of rounded numbers."""

    codebook_size: int = 0
    """Number of codes, the product of ``levels``; 0 = filled from them."""
    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])
    """Levels of each coordinate, 5 or more best ([8, 5, 5, 5]: 1,000 codes)."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        if not self.levels or min(self.levels) < 3:
            raise UserError(f"levels must be 3 or more each, e.g. [8,5,5,5] for 1,000 codes; got {list(self.levels)}")
        if self.codebook_size not in (0, math.prod(self.levels)):
            raise UserError(
                f"levels {list(self.levels)} make {math.prod(self.levels)} codes: leave codebook_size "
                f"({self.codebook_size}) out"
            )
        self.codebook_size = math.prod(self.levels)
        super().__post_init__()


@dataclass(kw_only=True)
class IBQConfig(NarrowConfig):
    """A VQVAE whose codes are learnt vectors; the likeliest is taken, and the gradient reaches all of them."""

    commitment: float = 0.25
    """Weight of the distance from the encoder's vectors to their codes."""
    entropy: float = 0.002
    """Weight of sure choices and of all codes in use (authors': 0.05, beside larger losses than an image's error;
    docs/experiments.md)."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        super().__post_init__()
        not_negative(self, "commitment", "entropy")


QUANTIZERS: dict[str, type[NarrowConfig]] = {"vq": VQConfig, "fsq": FSQConfig, "ibq": IBQConfig}


@dataclass(kw_only=True)
class VQVAEConfig(NarrowConfig):
    """What a checkpoint says of a VQVAE: which quantizer, and the settings of all of them."""

    quantizer: str = "vq"
    """One of QUANTIZERS, whose config says what each of the settings below means."""
    levels: list[int] = field(default_factory=list)
    """fsq."""
    decay: float = 0.99
    """vq."""
    idle: float = 0.1
    """vq."""
    commitment: float = 0.25
    """vq, ibq."""
    entropy: float = 0.002
    """ibq."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: no such quantizer, or a field is out of range; names it.
        """
        super().__post_init__()
        if self.quantizer not in QUANTIZERS:
            raise UserError(f"quantizer must be one of {', '.join(QUANTIZERS)}, got {self.quantizer!r}")
        if self.quantizer != "fsq" and self.levels:
            raise UserError(f"levels are those of quantizer=fsq; with {self.quantizer} leave them empty")
        config = QUANTIZERS[self.quantizer]
        config(**{item.name: getattr(self, item.name) for item in fields(config)})

    @classmethod
    def of(cls, config: NarrowConfig) -> "VQVAEConfig":
        """The same from the settings of one quantizer."""
        quantizer = next(name for name, kind in QUANTIZERS.items() if type(config) is kind)
        return cls(quantizer=quantizer, **{item.name: getattr(config, item.name) for item in fields(config)})


class VQLoss(NamedTuple):
    """Loss of a batch."""

    loss: Float[Tensor, ""]
    """reconstruction + codebook."""
    reconstruction: Float[Tensor, ""]
    """Mean over subpixels, in the units of ``config.likelihood``."""
    codebook: Float[Tensor, ""]
    """What the quantiser wants minimised; fsq wants nothing."""
    image_tokens: Int[Tensor, "b n"]
    """Codes, for codebook usage."""


class VQVAE(ConvTokenizer):
    """Encoder, quantiser, decoder.

    Args:
        config: sizes, likelihood, codebook.
    """

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config, outputs=config.codebook_dim)
        self.config = config
        self.quantizer = make_quantizer(config)
        self.init_weights()

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n"]:
        """Codes of pictures; the codebook learns nothing from them."""
        with torch.autocast(images.device.type, enabled=False), eval_mode(self.quantizer):
            return self.quantizer(to_sequence(self.encoded(images))).image_tokens

    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Pictures in [0, 1]."""
        self.check_tokens(image_tokens)
        return self.to_pixels(self.decoded(to_grid(self.quantizer.vectors(image_tokens), self.grid_size)))

    def loss(self, images: Float[Tensor, "b c H W"]) -> VQLoss:
        """Reconstruction error and what the quantiser adds; in training mode the codebook follows the batch.

        Raises:
            ValueError: pictures of another shape.
        """
        features = to_sequence(self.encoded(images)).float()
        with torch.autocast(images.device.type, enabled=False):  # the codes of encode, also in mixed precision
            codes = self.quantizer(features)
        output = self.decoded(to_grid(codes.vectors, self.grid_size)).float()
        reconstruction = self.reconstruction_error(output, images)
        return VQLoss(reconstruction + codes.loss, reconstruction, codes.loss, codes.image_tokens)


def make_quantizer(config: VQVAEConfig) -> Quantizer:
    """The quantiser of a config."""
    size, dim = config.codebook_size, config.codebook_dim
    if config.quantizer == "fsq":
        return ScalarGrid(config.levels, dim)
    if config.quantizer == "ibq":
        return LikeliestCode(size, dim, commitment=config.commitment, entropy=config.entropy)
    return NearestCode(size, dim, decay=config.decay, commitment=config.commitment, idle=config.idle)
