"""DALLEBart: stage two as DALL·E mini and mega have it, an encoder of captions and a decoder of picture tokens.

Source: github.com/borisdayma/dalle-mini, model/modeling.py; the network itself is in bart.py.

The encoder reads <s> caption </s> <pad>.. at ``text_positions`` positions, the decoder a begin token and the image
tokens in raster order; its output at a position predicts the image token of that position. There is no text loss.

Axes: b batch, g prompts, t text_positions, n image tokens, m image tokens given, q image positions, d dim,
k codebook_size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.models.attention import StreamView
from dalle_pytorch.models.bart import EPS, BartConfig, Decoder, Encoder, drop
from dalle_pytorch.models.checks import require
from dalle_pytorch.models.image_tokenizer import as_image_tokenizer
from dalle_pytorch.models.linear import Linear
from dalle_pytorch.models.loss import linear_cross_entropy, linear_nats
from dalle_pytorch.models.text_to_image import Losses, TextToImage
from dalle_pytorch.text import BartTokenizer, TextTokenizer

TEXT_STEP = 16
"""Caption positions are read in multiples of it: captions of up to 14 tokens, with their two ends, are then alike."""


@dataclass(kw_only=True)
class DALLEBartConfig(BartConfig):
    """A DALLEBart apart from its image tokenizer; the defaults are DALL·E mini's."""

    has_soft_targets: ClassVar[bool] = False
    text_vocab_size: int = 50_264
    """Rows of the text embedding, special ids included (mega: 50272)."""
    text_positions: int = 64
    """Caption tokens with the two ids around them."""
    text_bos: int = 0
    """Id of <s>, before a caption. (0 is also our padding, which no model sees.)"""
    text_pad: int = 1
    """Id of <pad>, after </s>; never attended to."""
    text_eos: int = 2
    """Id of </s>, after a caption."""
    image_vocab_size: int = 16_384
    """Rows of the image embedding and of the head, minus one; may exceed the codebook (mega: 16415)."""
    bos_id: int = 16_384
    """Row of the image embedding that begins a picture. (min-dalle 0.4.11 takes 16383, the last code, by mistake.)"""
    grid_size: int = 16
    """Token rows, equal to token columns."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one in training, for guidance; in [0, 1)."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        super().__post_init__()
        at_least_one(self, "image_vocab_size", "grid_size")
        if self.text_positions < 3:
            raise UserError(f"text_positions must be at least 3 (<s>, a token, </s>), got {self.text_positions}")
        if not 0 <= self.caption_dropout < 1:
            raise UserError(f"caption_dropout must lie in [0, 1), got {self.caption_dropout}")
        special = {name: getattr(self, name) for name in ("text_bos", "text_pad", "text_eos")}
        for name, value in special.items():
            if not 0 <= value < self.text_vocab_size:
                raise UserError(f"{name} ({value}) must lie in [0, text_vocab_size = {self.text_vocab_size})")
        if len(set(special.values())) < len(special):
            raise UserError(f"text_bos, text_pad and text_eos must differ, got {list(special.values())}")
        if not 0 <= self.bos_id <= self.image_vocab_size:
            raise UserError(f"bos_id ({self.bos_id}) must lie in [0, image_vocab_size = {self.image_vocab_size}]")

    @property
    def text_len(self) -> int:
        """Tokens that a caption may have, without <s> and </s>."""
        return self.text_positions - 2

    def fitted(
        self, vae: nn.Module, tokenizer: TextTokenizer, text_encoder: nn.Module | None = None
    ) -> "DALLEBartConfig":
        """The settings with the tokenizers' sizes in their place; the begin token follows the codebook.

        BART's own tokenizer has <s>, <pad> and </s> in its vocabulary; others have none, and get two ids behind their
        own (<s> takes 0, which no caption has).

        Raises:
            UserError: a text encoder is given.
        """
        if text_encoder is not None:
            raise UserError("text_encoder is not there for a DALL·E mini, which has its own: leave it out")
        images, ids = as_image_tokenizer(vae), tokenizer.vocab_size
        codes = {
            "grid_size": images.grid_size,
            "image_vocab_size": images.codebook_size,
            "bos_id": images.codebook_size,
        }
        if isinstance(tokenizer, BartTokenizer):
            return replace(self, **codes, text_vocab_size=ids)
        return replace(self, **codes, text_vocab_size=ids + 2, text_bos=0, text_pad=ids, text_eos=ids + 1)

    def build(self, vae: nn.Module, text_encoder: nn.Module | None = None) -> "DALLEBart":
        """A DALLEBart with fresh weights."""
        return DALLEBart(self, vae)


class DALLEBart(TextToImage):
    """Model of pictures given captions.

    Args:
        config: sizes and options.
        vae: image tokenizer; kept frozen and in eval mode, and saved along.

    Raises:
        ValueError: ``vae`` is no image tokenizer, or its grid or codebook does not fit the config.
    """

    config: DALLEBartConfig

    def __init__(self, config: DALLEBartConfig, vae: nn.Module) -> None:
        super().__init__(config, vae)
        if self.grid_size != config.grid_size:
            raise UserError(f"the vae has {self.grid_size} token rows, the config grid_size = {config.grid_size}")
        if self.codebook_size > config.image_vocab_size:
            raise UserError(
                f"the vae's codebook has {self.codebook_size} codes, more than image_vocab_size = "
                f"{config.image_vocab_size}"
            )
        dim = config.dim
        self.text_emb = nn.Embedding(config.text_vocab_size, dim)
        self.text_pos = nn.Embedding(config.text_positions, dim)
        self.text_norm = nn.LayerNorm(dim, eps=EPS)
        self.encoder = Encoder(config)
        self.image_emb = nn.Embedding(config.image_vocab_size + 1, dim)
        self.image_pos = nn.Embedding(self.num_image_tokens, dim)
        self.image_norm = nn.LayerNorm(dim, eps=EPS)
        self.decoder = Decoder(config)
        self.image_head = Linear(dim, config.image_vocab_size + 1, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02) for embeddings and linear layers, as in dalle-mini."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith("vae."):
                nn.init.normal_(module.weight, std=0.02)

    def views(self) -> list[StreamView]:
        """What each decoder layer sees when all positions are there: those before it."""
        return [StreamView(None, None, None, None) for _ in self.decoder.blocks]

    def pad_text(self, text_tokens: Int[Tensor, "b given"], *, wait: bool = True) -> Int[Tensor, "b t"]:
        """Captions as the encoder reads them: <s>, the ids, </s>, and <pad> up to the end. Makes a copy.

        Args:
            text_tokens: ids of a TextTokenizer, 0 = padding; at most text_len of them.
            wait: for the checks of the ids on a GPU, see ``checks.require``.

        Raises:
            ValueError: too many tokens, an id outside the vocabulary, or one that means <pad>, <s> or </s> here.
        """
        self.check_text_tokens(text_tokens, wait=wait)
        config = self.config
        text = F.pad(text_tokens, (0, config.text_len - text_tokens.shape[1]))
        special = [config.text_bos, config.text_pad, config.text_eos]
        held = torch.stack([text == token for token in special if token > 0])
        require(
            ~held.any(),
            lambda: (
                f"text tokens hold {special}, which mean <s>, <pad> and </s> to this model: they come from another "
                "text tokenizer"
            ),
            wait=wait,
        )
        ends = ((text > 0) * torch.arange(1, config.text_len + 1, device=text.device)).amax(dim=1, keepdim=True)
        padded = F.pad(torch.where(text == 0, config.text_pad, text), (1, 1), value=config.text_pad)
        padded[:, 0] = config.text_bos
        return padded.scatter(1, ends + 1, config.text_eos)

    def visible(self, padded_text: Int[Tensor, "g t"]) -> Bool[Tensor, "g t"]:
        """Caption positions that may be attended to: all but <pad>."""
        return padded_text != self.config.text_pad

    def encode_text(self, padded_text: Int[Tensor, "g t"]) -> Float[Tensor, "g t d"]:
        """What the decoder attends to, from ``pad_text``'s ids."""
        x = self.text_norm(self.text_emb(padded_text) + self.text_pos.weight)
        return self.encoder(drop(x, self.config.dropout, self.training), self.visible(padded_text))

    def embed_bos(self, batch: int) -> Float[Tensor, "b 1 d"]:
        """Input of the first position, which begins a picture."""
        x = self.image_norm(self.image_emb.weight[self.config.bos_id] + self.image_pos.weight[0])
        return x.expand(batch, 1, -1)

    def embed_image(
        self, image_tokens: Int[Tensor, "b m"], positions: Int[Tensor, " m"], targets: Int[Tensor, " m"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """Inputs of image tokens at some raster positions; each is read one position later."""
        return self.image_norm(self.image_emb(image_tokens) + self.image_pos(positions + 1))

    @property
    def trunk(self) -> Decoder:
        """The decoder; its context are the captions' keys in every layer, and which of them are visible."""
        return self.decoder

    @property
    def prompt_length(self) -> int:
        """The token that begins an image; captions are read in cross-attention."""
        return 1

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.config.heads

    @property
    def key_width(self) -> int:
        """Channels of a position's keys in a layer."""
        return self.config.dim

    def pattern(self, layer: int) -> str:
        """Attention pattern of a layer: all that came before."""
        return "full"

    def read_prompt(
        self,
        text_tokens: Int[Tensor, "g given"],
        trunk: nn.Module,
        order: Int[Tensor, " n"],
        *,
        dtype: torch.dtype,
        trim: bool,
    ) -> tuple[Float[Tensor, "g 1 d"], dict[str, Any]]:
        """Input of the token that begins an image, and captions as the decoder reads them; see ``TextToImage``."""
        padded = self.pad_text(text_tokens)
        visible, memory = self.visible(padded), self.encode_text(padded)
        if trim:  # in steps, so that a prompt's sums seldom depend on the others
            longest = -(-(int(visible.any(dim=0).nonzero().max()) + 1) // TEXT_STEP) * TEXT_STEP
            visible, memory = visible[:, :longest], memory[:, :longest]
        keys = [layer.to(dtype) for layer in cast(Decoder, trunk).keys(memory)]
        return self.embed_bos(len(padded)), {"captions": keys, "visible": visible}

    def hidden(self, text_tokens: Int[Tensor, "b given"], image_tokens: Int[Tensor, "b m"]) -> Float[Tensor, "b q d"]:
        """The decoder's outputs; the last image token, which predicts nothing, is not read."""
        self.check_image_tokens(image_tokens, wait=False)
        if len(text_tokens) != len(image_tokens):
            raise ValueError(f"{len(text_tokens)} captions given for {len(image_tokens)} pictures")
        padded = self.pad_text(text_tokens, wait=False)
        x = self.embed_bos(len(padded))
        if read := min(image_tokens.shape[1], self.num_image_tokens - 1):
            positions = torch.arange(read, device=x.device)
            x = torch.cat([x, self.embed_image(image_tokens[:, :read], positions)], dim=1)
        x = drop(x, self.config.dropout, self.training)
        return self.decoder(x, self.encode_text(padded), self.visible(padded), self.views())

    def image_logits(
        self, text_tokens: Int[Tensor, "b given"], image_tokens: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b q k"]:
        """Scores of every image token given the caption and those before it; the head's other rows are left out."""
        return self.image_head(self.hidden(text_tokens, image_tokens))[..., : self.codebook_size]

    def image_nll(self, text_tokens: Int[Tensor, "b given"], image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Nats of each image token among the codes alone, where ``loss`` is among all rows of the head."""
        self.check_pairs(text_tokens, image_tokens)
        h = self.hidden(text_tokens, image_tokens).flatten(0, 1)
        nats = linear_nats(h, self.image_head, image_tokens.flatten(), classes=self.codebook_size)
        return nats.view_as(image_tokens)

    def loss(
        self,
        text_tokens: Int[Tensor, "b given"],
        image_tokens: Int[Tensor, "b n"],
        *,
        generator: torch.Generator | None = None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> Losses:
        """Cross entropy of a batch of captioned pictures over all ``image_vocab_size + 1`` rows of the head.

        Inputs are not changed.

        Args:
            text_tokens: ids of the text tokenizer, 0 = padding; at most text_len of them.
            image_tokens: all n tokens, raster order.
            generator: for caption_dropout (training mode only); None = torch's global one.
            mean: for calls as of ``DALLE.loss``; not needed, for all pictures have as many tokens.

        Raises:
            ValueError: shapes or ids that do not fit; names the numbers.
        """
        self.check_pairs(text_tokens, image_tokens)
        h = self.hidden(self.corrupt(text_tokens, generator), image_tokens)
        image = linear_cross_entropy(h.flatten(0, 1), self.image_head, image_tokens.flatten())
        return Losses(image, image)

    def corrupt(self, text_tokens: Int[Tensor, "b given"], generator: torch.Generator | None) -> Int[Tensor, "b given"]:
        """Captions after caption_dropout; a copy, and unchanged in eval mode."""
        if not (self.training and self.config.caption_dropout):
            return text_tokens
        device = "cpu" if generator is None else generator.device
        draw = torch.rand(len(text_tokens), 1, generator=generator, device=device).to(text_tokens.device)
        return torch.where(draw < self.config.caption_dropout, 0, text_tokens)
