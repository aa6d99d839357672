"""VQGAN: a convolutional image tokenizer with attention at coarse resolutions; used here, not trained.

Paper: Esser et al. 2021, https://arxiv.org/abs/2012.09841. One network for the tokenizers of taming-transformers
(VQModel and GumbelVQ), of DALL·E mini and minDALL-E, and of LlamaGen (Sun et al. 2024, https://arxiv.org/abs/2406.06525);
they differ in sizes, in how a code is chosen, in the range of pixels and in where attention stands. Sizes and
layers are in vqgan_layers.py.

Axes: b batch, c channels, H W pixels, h w token grid, n = h * w, i o layer channels, d embed_dim.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.models.checks import check_ids
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.models.vqgan_layers import Decoder, Encoder, VQGANConfig, in_fast_layout

MAX_SCORES = 2**25  # of codes at a time: 128 MB, or 2048 tokens with the common 16384 codes
PIXELS = 2**18  # computed at a time, at least one picture: about 1 GB of features in fp32 with 128 channels


class VQGAN(ImageTokenizer):
    """Encoder to the nearest codes, codes to pixels.

    Args:
        config: sizes, kind of codes and range of pixels.

    Source:
        taming-transformers, taming/models/vqgan.py; LlamaGen, tokenizer/tokenizer_image/vq_model.py. The losses and the
        discriminator that train it are not here.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.grid_size = config.image_size // config.reduction
        self.codebook_size = config.codebook_size
        self.channels = config.channels
        self.encoder = Encoder(config) if config.encoder else None
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1) if config.encoder else None
        logits = config.encoder and config.quantizer == "gumbel"
        self.code_logits = nn.Conv2d(config.embed_dim, config.codebook_size, 1) if logits else None
        self.codebook = nn.Embedding(config.codebook_size, config.embed_dim)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config)

    @property
    def can_encode(self) -> bool:
        """Whether it has an encoder."""
        return self.encoder is not None

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n"]:
        """Code of every position, from pictures in [0, 1]; without noise, for "gumbel" too. Large batches in parts.

        Raises:
            ValueError: pictures of another shape, or the model has only a decoder.
        """
        if self.encoder is None or self.quant_conv is None:
            raise ValueError(
                "this VQGAN cannot encode pictures: its file has only a decoder, as min-dalle's detoker.pt; import the "
                "weights with a whole one (vqgan=)"
            )
        self.check_images(images)
        codes = []
        with torch.autocast(images.device.type, enabled=False):  # the same codes in training as when cached or sampled
            for part in images.split(self.together(self.image_size**2)):
                pixels = part.to(self.codebook.weight.dtype)
                if self.config.pixel_range == "minus_one_to_one":
                    pixels = 2 * pixels - 1
                latents = self.quant_conv(self.encoder(in_fast_layout(pixels)))
                codes.append(self.nearest(rearrange(latents, "b d h w -> (b h w) d")).view(len(part), -1))
        return torch.cat(codes)

    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Pictures in [0, 1]; large batches in parts."""
        self.check_tokens(image_tokens)
        return self._decode(rearrange(image_tokens, "b (h w) -> b h w", h=self.grid_size))

    def decode_grid(self, image_tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        """Pictures in [0, 1] of any rectangle of tokens, which blend into each other; ``reduction`` pixels a token.

        Raises:
            ValueError: an id outside the codebook; names the numbers.
        """
        check_ids(image_tokens, self.codebook_size, "image")
        return self._decode(image_tokens)

    def together(self, pixels: int) -> int:
        """Pictures of so many pixels computed at a time."""
        return max(1, PIXELS // pixels)

    def _decode(self, image_tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        _, rows, columns = image_tokens.shape
        size = self.together(rows * columns * self.config.reduction**2)
        return torch.cat([self._pixels(part) for part in image_tokens.split(size)])

    def _pixels(self, image_tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        codes = self.codebook(image_tokens)
        if self.config.normalize_codes:
            codes = F.normalize(codes, dim=-1)
        pixels = self.decoder(in_fast_layout(self.post_quant_conv(rearrange(codes, "b h w d -> b d h w")))).float()
        if self.config.pixel_range == "minus_one_to_one":
            pixels = (pixels + 1) / 2
        return pixels.clamp(0, 1)

    def nearest(self, latents: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """Code of every latent: the nearest, or for "gumbel" that of the largest logit; in fp32."""
        if self.code_logits is not None:
            weight, bias = self.code_logits.weight.flatten(1).float(), cast(Tensor, self.code_logits.bias).float()
        else:
            weight = self.codebook.weight.float()
            if self.config.normalize_codes:  # the latent's own length shifts all distances alike
                weight = F.normalize(weight, dim=1)
            bias = weight.square().sum(dim=1) / -2  # |z - e|^2 is least where z e - |e|^2 / 2 is largest
        rows = max(1, MAX_SCORES // self.codebook_size)
        return torch.cat([F.linear(part, weight, bias).argmax(dim=1) for part in latents.float().split(rows)])
