"""VQVAE: stage one with other codebooks than the Gumbel-softmax's, in the same encoder and decoder.

Axes: b batch, c channels, H W pixels, n image tokens in raster order, d codebook_dim.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.conv_tokenizer import ConvConfig, ConvTokenizer
from dalle_pytorch.models.image_tokenizer import NOT_RELAXED, Reconstruction, Relaxation
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.quantizers import CODEBOOKS, CodebookConfig, make_quantizer, to_grid, to_sequence


@dataclass(kw_only=True)
class VQVAEConfig(CodebookConfig, ConvConfig):
    """Sizes, likelihood and codebook; code vectors are narrow, as ViT-VQGAN advises (quantizers.NearestCode)."""

    codebook_size: int = 1024
    """Number of codes; of fsq the product of ``levels``, filled from them where it is 0."""
    codebook_dim: int = 16
    """Width of a code vector."""
    quantizer: str = "ema"
    """"ema" (learnt vectors that follow moving averages), "fsq" (a grid of rounded numbers), "ibq" (learnt vectors, all
    of which get a gradient), "lfq" or "bsq" (signs)."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: no such quantizer, or a field is out of range; names it.
        """
        if self.quantizer == "vq":  # its name in checkpoints of earlier versions
            self.quantizer = "ema"
        if self.quantizer not in CODEBOOKS:
            raise UserError(f"quantizer must be one of {', '.join(CODEBOOKS)}, got {self.quantizer!r}")
        self.check_codebook()
        super().__post_init__()


@dataclass(kw_only=True)
class FSQConfig(VQVAEConfig):
    """With a grid of rounded numbers, 1,000 codes."""

    codebook_size: int = 0
    quantizer: str = "fsq"
    levels: list[int] = field(default_factory=lambda: [8, 5, 5, 5])


@dataclass(kw_only=True)
class IBQConfig(VQVAEConfig):
    """With learnt vectors, all of which get a gradient."""

    quantizer: str = "ibq"


@dataclass(kw_only=True)
class LFQConfig(VQVAEConfig):
    """With the signs of a short vector."""

    quantizer: str = "lfq"


@dataclass(kw_only=True)
class BSQConfig(VQVAEConfig):
    """With the signs of a short vector on the unit sphere."""

    quantizer: str = "bsq"


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
        self.quantizer = make_quantizer(config, config.codebook_dim)
        self.init_weights()

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n"]:
        """Codes of pictures; the codebook learns nothing from them."""
        with torch.autocast(images.device.type, enabled=False), eval_mode(self.quantizer):
            return self.quantizer(to_sequence(self.encoded(images))).image_tokens

    def output(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b maps H W"]:
        """The decoder's output for tokens."""
        return self.decoded(to_grid(self.quantizer.vectors(image_tokens), self.grid_size))

    def code_vectors(self) -> Float[Tensor, "k d"]:
        """Of all codes."""
        tokens = torch.arange(self.codebook_size, device=self.mean.device)
        return self.quantizer.vectors(tokens[None])[0]

    def reconstruct(
        self,
        images: Float[Tensor, "b c H W"],
        relaxation: Relaxation = NOT_RELAXED,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Images through the nearest codes."""
        features = to_sequence(self.encoded(images)).float()
        with torch.autocast(images.device.type, enabled=False):  # the codes of encode, also in mixed precision
            codes = self.quantizer(features)
        output = self.decoded(to_grid(codes.vectors, self.grid_size)).float()
        return Reconstruction(output, codes.loss, {"codebook": codes.loss}, codes.image_tokens)

    def loss(self, images: Float[Tensor, "b c H W"]) -> VQLoss:
        """Reconstruction error and what the quantiser adds; in training mode the codebook follows the batch.

        Raises:
            ValueError: images of another shape.
        """
        found = self.reconstruct(images)
        reconstruction = self.reconstruction_error(found.output, images)
        return VQLoss(reconstruction + found.codes_loss, reconstruction, found.codes_loss, found.image_tokens)
