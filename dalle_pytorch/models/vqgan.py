"""VQGAN: a convolutional image tokenizer with attention at coarse resolutions.

Paper: Esser et al. 2021, https://arxiv.org/abs/2012.09841. One network for the tokenizers of taming-transformers
(VQModel and GumbelVQ), of DALL·E mini and minDALL-E, and of LlamaGen (Sun et al. 2024, https://arxiv.org/abs/2406.06525);
they differ in sizes, in how a code is chosen, in the range of pixels and in where attention stands. Sizes and
layers are in vqgan_layers.py; the losses that train it in training/image_losses.py.

Axes: b batch, c channels, H W pixels, h w token grid, n = h * w, i o layer channels, d embed_dim.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.models.checks import check_ids
from dalle_pytorch.models.conv_tokenizer import pixel_error
from dalle_pytorch.models.image_tokenizer import NOT_RELAXED, Reconstruction, Relaxation, TrainableTokenizer
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.quantizers import CODEBOOKS, gumbel_softmax, logits_loss, make_quantizer, to_grid, to_sequence
from dalle_pytorch.models.vqgan_layers import Decoder, Encoder, VQGANConfig, in_fast_layout

MAX_SCORES = 2**25  # of codes at a time: 128 MB, or 2048 tokens with the common 16384 codes
PIXELS = 2**18  # computed at a time, at least one picture: about 1 GB of features in fp32 with 128 channels


class VQGAN(TrainableTokenizer):
    """Encoder to the nearest codes, codes to pixels.

    Args:
        config: sizes, kind of codes and range of pixels.

    Source:
        taming-transformers, taming/models/vqgan.py; LlamaGen, tokenizer/tokenizer_image/vq_model.py.
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
        own = config.quantizer in CODEBOOKS
        self.quantizer = make_quantizer(config, config.embed_dim) if own else None
        self.codebook = None if own else nn.Embedding(config.codebook_size, config.embed_dim)
        if self.codebook is not None:
            if config.normalize_codes:
                nn.init.normal_(self.codebook.weight, std=config.embed_dim**-0.5)  # of length 1 or so, as when read
            else:
                nn.init.uniform_(self.codebook.weight, -1 / config.codebook_size, 1 / config.codebook_size)
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
                latents = self._latents(part)
                if self.quantizer is None:
                    found = self.nearest(rearrange(latents, "b d h w -> (b h w) d"))
                else:
                    with eval_mode(self.quantizer):
                        found = self.quantizer(to_sequence(latents)).image_tokens
                codes.append(found.view(len(part), -1))
        return torch.cat(codes)

    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Images in [0, 1]; large batches in parts."""
        self.check_tokens(image_tokens)
        return self._decode(rearrange(image_tokens, "b (h w) -> b h w", h=self.grid_size))

    def decode_grid(self, image_tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        """Images in [0, 1] of any rectangle of tokens, which blend into each other; ``reduction`` pixels a token.

        Raises:
            ValueError: an id outside the codebook; names the numbers.
        """
        check_ids(image_tokens, self.codebook_size, "image")
        return self._decode(image_tokens)

    def reconstruct(
        self,
        images: Float[Tensor, "b c H W"],
        relaxation: Relaxation = NOT_RELAXED,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Images through codes: of "vq" learnt by gradients as in VQ-VAE, of "gumbel" relaxed, else the quantiser's."""
        self.check_images(images)
        latents = self._latents(images).to(self.post_quant_conv.weight.dtype)
        with torch.autocast(images.device.type, enabled=False):  # the codes of encode, also in mixed precision
            vectors, loss, parts, tokens = self._quantized(latents, images.numel(), relaxation, generator)
        return Reconstruction(self._decoded(vectors), loss, parts, tokens)

    def output(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """The decoder's output for tokens."""
        vectors = F.embedding(image_tokens, self.code_vectors())
        return self._decoded(rearrange(vectors, "b (h w) d -> b d h w", h=self.grid_size))

    def code_vectors(self) -> Float[Tensor, "k d"]:
        """Of all codes."""
        if self.quantizer is None:
            return self._vectors()
        tokens = torch.arange(self.codebook_size, device=self.post_quant_conv.weight.device)
        return self.quantizer.vectors(tokens[None])[0]

    @property
    def decoding_parts(self) -> list[nn.Module]:
        """The decoder and the convolution before it."""
        return [self.post_quant_conv, self.decoder]

    def reconstruction_error(
        self, output: Float[Tensor, "b c H W"], images: Float[Tensor, "b c H W"]
    ) -> Float[Tensor, ""]:
        """Mean error of pixels, in the units of ``pixel_range``."""
        return pixel_error(self.config.likelihood, output, self._to_network(images))

    def to_pixels(self, output: Float[Tensor, "b c H W"], *, clamp: bool = True) -> Float[Tensor, "b c H W"]:
        """Decoder output to images."""
        pixels = (output + 1) / 2 if self.config.pixel_range == "minus_one_to_one" else output
        return pixels.clamp(0, 1) if clamp else pixels

    def together(self, pixels: int) -> int:
        """Images of so many pixels computed at a time."""
        return max(1, PIXELS // pixels)

    def nearest(self, latents: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """Code of every latent: the nearest, or for "gumbel" that of the largest logit; in fp32."""
        if self.code_logits is not None:
            weight, bias = self.code_logits.weight.flatten(1).float(), cast(Tensor, self.code_logits.bias).float()
        else:
            weight = self._vectors().float()  # of length 1, the latent's own length shifts all distances alike
            bias = weight.square().sum(dim=1) / -2  # |z - e|^2 is least where z e - |e|^2 / 2 is largest
        rows = max(1, MAX_SCORES // self.codebook_size)
        return torch.cat([F.linear(part, weight, bias).argmax(dim=1) for part in latents.float().split(rows)])

    def _to_network(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        return 2 * images - 1 if self.config.pixel_range == "minus_one_to_one" else images

    def _latents(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d h w"]:
        assert self.encoder is not None
        assert self.quant_conv is not None
        pixels = self._to_network(images.to(self.quant_conv.weight.dtype))
        return self.quant_conv(self.encoder(in_fast_layout(pixels)))

    def _vectors(self) -> Float[Tensor, "k d"]:
        """Of all codes."""
        assert self.codebook is not None
        return F.normalize(self.codebook.weight, dim=1) if self.config.normalize_codes else self.codebook.weight

    def _quantized(
        self, latents: Float[Tensor, "b d h w"], subpixels: int, relaxation: Relaxation, generator: Any
    ) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, ""], dict[str, Tensor], Int[Tensor, "b n"]]:
        if self.quantizer is not None:
            codes = self.quantizer(to_sequence(latents))
            return to_grid(codes.vectors, self.grid_size), codes.loss, {"codebook": codes.loss}, codes.image_tokens
        if self.code_logits is not None:
            logits = self.code_logits(latents)
            relaxed = gumbel_softmax(logits, relaxation.gumbel_tau, generator, straight_through=True)
            kl, usage = logits_loss(logits, subpixels)
            loss = relaxation.kl_weight * kl + relaxation.usage_weight * usage
            vectors = torch.einsum("bkhw,kd->bdhw", relaxed, self._vectors())
            return vectors, loss, {"kl": kl, "usage": usage}, logits.detach().argmax(dim=1).flatten(1)
        z = to_sequence(latents)
        z = F.normalize(z, dim=-1) if self.config.normalize_codes else z
        tokens = self.nearest(z.detach().flatten(0, 1)).view(z.shape[:2])
        vectors = F.embedding(tokens, self._vectors())
        loss = F.mse_loss(vectors, z.detach()) + self.config.commitment * F.mse_loss(z, vectors.detach())
        through = z + (vectors - z).detach()  # the decoder's gradient goes on to the encoder as it is
        return to_grid(through, self.grid_size), loss, {"codebook": loss}, tokens

    def _decode(self, image_tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        _, rows, columns = image_tokens.shape
        size = self.together(rows * columns * self.config.reduction**2)
        return torch.cat([self._pixels(part) for part in image_tokens.split(size)])

    def _pixels(self, image_tokens: Int[Tensor, "b h w"]) -> Float[Tensor, "b c H W"]:
        if self.quantizer is None:
            codes = F.embedding(image_tokens, self._vectors())
        else:
            codes = self.quantizer.vectors(image_tokens.flatten(1)).unflatten(1, image_tokens.shape[1:])
        return self.to_pixels(self._decoded(rearrange(codes, "b h w d -> b d h w")))

    def _decoded(self, vectors: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        return self.decoder(in_fast_layout(self.post_quant_conv(vectors))).float()
