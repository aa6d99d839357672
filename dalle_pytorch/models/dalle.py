"""DALLE: stage two, one transformer over a caption and the picture tokens that follow it.

Paper: Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, section 2.2 and appendix B.

The stream is <bos>, ``text_len`` text positions, then the image tokens in raster order; the output at a position
predicts the next one. (With ``any_order`` image tokens may come in another order, each input then also says which
position is next.) Text and image have a head each, so no probability is spent on, and no time spent on, the other's
vocabulary. A caption shorter than ``text_len`` is filled with a pad of its own for each position (section 2.2). Models
of others may lack the <bos> (``foreign.bos=False``): their first text token is given, never predicted.

A caption may instead be read by a text encoder that others have trained (``text_features``): the outputs for its tokens
stand where its embeddings would, and captions are not predicted.

Axes: b batch, t text_len, n image tokens, s = 1 + t + n stream positions, d width, v text vocabulary, k codebook_size,
p = t predicted text tokens, t - 1 without <bos>.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one, not_negative
from dalle_pytorch.models.attention import StreamView, reordered, rotary_turns
from dalle_pytorch.models.block_sparse import Layout, layout
from dalle_pytorch.models.linear import Linear
from dalle_pytorch.models.loss import linear_cross_entropy, linear_nats
from dalle_pytorch.models.patterns import pattern_mask
from dalle_pytorch.models.text_encoder import TextEncoder
from dalle_pytorch.models.text_to_image import Losses, TextNLL, TextToImage
from dalle_pytorch.models.transformer import Transformer, TransformerConfig
from dalle_pytorch.text import TextTokenizer

POSITIONS = ("rotary", "learned", "both", "flat")


@dataclass(kw_only=True)
class DALLEConfig(TransformerConfig):
    """A DALLE apart from its image tokenizer, which says grid and codebook size."""

    has_soft_targets: ClassVar[bool] = True
    text_vocab_size: int = 10_000
    """Text ids, padding (0) included; filled from the text tokenizer in training."""
    text_len: int = 256
    """Text positions after the <bos>."""
    text_features: int = 0
    """Width of the features of a frozen text encoder, which stand for captions; 0 = none. Filled in training from
    text_encoder. Captions are then not predicted."""
    attn_types: list[str] = field(default_factory=lambda: ["full"])
    """Attention patterns, cycled over the depth: full, axial_row, axial_col, conv_like."""
    conv_kernel: int = 11
    """Kernel of conv_like (the paper: 11; DALLE-pytorch: 5)."""
    positions: str = "rotary"
    """"rotary" (relative), "learned" (text + row + column embeddings, the paper's), "both", or "flat" (text + one
    embedding for each image token)."""
    shift_tokens: bool = True
    """Feed each sublayer a quarter of the channels from the token above and from the left."""
    any_order: bool = False
    """Image tokens in any order: each input is told which position it is to predict (RAR's target-aware positions).
    train_dalle.py's random_order says in which ones they are learned; needs shift_tokens=false and full attention."""
    loss_img_weight: float = 7.0
    """Image loss over text loss; the paper weighs them 7/8 : 1/8."""
    tie_embeddings: bool = False
    """Use the input embeddings as output heads."""
    one_pad: bool = False
    """Fill short captions with one pad for all positions; otherwise each has its own (section 2.2)."""
    caption_dropout: float = 0.0
    """Share of captions replaced by the empty one in training, for guidance; in [0, 1)."""
    token_dropout: float = 0.0
    """Share of input image tokens replaced by random ones in training, against overfitting; in [0, 1)."""
    z_loss: float = 0.0
    """Weight of log(Z) ** 2 in both losses in training, against drifting logits (PaLM, section 5: 1e-4); 0 = none."""
    contrast_weight: float = 0.0
    """Weight of the contrastive loss in training, which makes pictures less likely under wrong captions; 0 = none.
    Doubles the arithmetic of a step."""
    contrast_scale: float = 5.0
    """Steepness of the contrastive loss: the weight of a picture halves for every log(2) / contrast_scale nats a token
    by which its own caption explains it better than the wrong one, once that is much. 5, not tuned, keeps wrong
    captions in play until they cost some 0.6 nats a token."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        super().__post_init__()
        foreign = self.foreign
        at_least_one(self, "text_vocab_size", "text_len")
        if not self.attn_types:
            raise UserError("attn_types is empty; name at least one pattern, e.g. [full]")
        for pattern in self.attn_types:
            pattern_mask(pattern, 1, 1, semantics=foreign.attn_semantics, kernel=self.conv_kernel)
        if self.positions not in POSITIONS:
            raise UserError(f"positions must be one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if foreign.rotate_values and not self.rotated:
            raise UserError(f"rotate_values needs positions that rotate (rotary or both), got {self.positions!r}")
        if foreign.rotary != "grid" and not self.rotated:
            raise UserError(
                f"rotary={foreign.rotary} needs positions that rotate (rotary or both), got {self.positions!r}"
            )
        if not foreign.bos and self.text_len < 2:
            raise UserError(f"without bos text_len must be at least 2, got {self.text_len}: its first token is given")
        for name in ("caption_dropout", "token_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        not_negative(self, "loss_img_weight", "z_loss", "contrast_weight", "text_features")
        if self.contrast_scale <= 0:
            raise UserError(f"contrast_scale must be positive, got {self.contrast_scale}")
        if self.any_order and (self.shift_tokens or set(self.attn_types) != {"full"}):
            raise UserError(
                "any_order needs shift_tokens=false and attn_types=[full]: neighbours in the image may come later"
            )
        if self.shift_tokens and self.dim % 4:
            raise UserError(f"shift_tokens moves quarters of the width: dim ({self.dim}) must be a multiple of 4")

    def fitted(
        self, vae: nn.Module, tokenizer: TextTokenizer, text_encoder: TextEncoder | None = None
    ) -> "DALLEConfig":
        """The settings with the text tokenizer's vocabulary and the text encoder's width."""
        width = 0 if text_encoder is None else text_encoder.config.width
        return replace(self, text_vocab_size=tokenizer.vocab_size, text_features=width)

    def build(self, vae: nn.Module, text_encoder: TextEncoder | None = None) -> "DALLE":
        """A DALLE with fresh weights."""
        return DALLE(self, vae, text_encoder)

    @property
    def text_length(self) -> int:
        """Text positions of the stream, the <bos> included."""
        return self.text_len + int(self.foreign.bos)

    @property
    def num_pads(self) -> int:
        """Ids that fill short captions; they follow those of the vocabulary."""
        return 1 if self.one_pad else self.text_len

    @property
    def rotated(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.positions in ("rotary", "both")

    @property
    def embedded_ids(self) -> int:
        """Text ids that have an embedding, apart from the pads."""
        return 0 if self.text_features else self.text_vocab_size

    @property
    def biased_heads(self) -> bool:
        """Whether the output heads have biases."""
        if self.foreign.head_bias is None:
            return self.bias and not self.tie_embeddings
        return self.foreign.head_bias


def check_encoder(config: DALLEConfig, text_encoder: TextEncoder | None) -> None:
    """Refuse a text encoder of another width, and captions that it cannot read in one piece.

    Raises:
        UserError: names the numbers.
    """
    width = 0 if text_encoder is None else text_encoder.config.width
    if width != config.text_features:
        raise UserError(f"the text encoder has {width} features, text_features is {config.text_features}")
    if text_encoder is not None and text_encoder.config.max_tokens is not None:
        room = text_encoder.config.max_tokens - text_encoder.config.marks
        if config.text_len > room:
            raise UserError(f"the text encoder reads captions of {room} tokens at most, text_len is {config.text_len}")


class DALLELogits(NamedTuple):
    """Scores of the next token. Position i of each predicts token i of its kind: no shift is left to the caller.

    Without <bos> nothing predicts the first text token, and position i of text predicts token i + 1.
    """

    text: Float[Tensor, "b p v"] | None
    """Over the text ids and then the pads; None under a text encoder."""
    image: Float[Tensor, "b n k"]


class DALLE(TextToImage):
    """Autoregressive model of captions and pictures.

    Args:
        config: sizes and options.
        vae: image tokenizer; kept frozen and in eval mode, and saved along.
        text_encoder: where ``config.text_features`` says so; kept frozen and in eval mode, and saved along.

    Raises:
        ValueError: ``vae`` lacks a name of the ImageTokenizer contract, or the text encoder is another one.

    Source:
        Ramesh et al. 2021, section 2.2. Deviations: GEGLU, rotary positions by default, text loss up to the first pad.
    """

    config: DALLEConfig
    rotary: Tensor
    masks: Tensor

    def __init__(self, config: DALLEConfig, vae: nn.Module, text_encoder: TextEncoder | None = None) -> None:
        super().__init__(config, vae)
        check_encoder(config, text_encoder)
        self.text_encoder = None if text_encoder is None else text_encoder.requires_grad_(False).eval()
        self.text_proj = nn.Sequential()
        if config.text_features:
            norm = nn.LayerNorm(config.text_features, elementwise_affine=False)
            self.text_proj = nn.Sequential(norm, Linear(config.text_features, config.dim, bias=config.bias))
        self.text_emb = nn.Embedding(config.embedded_ids + config.num_pads, config.dim)  # ids, then the pads
        self.image_emb = nn.Embedding(self.codebook_size, config.dim)
        self.bos = nn.Parameter(torch.zeros(config.dim)) if config.foreign.bos else None
        if config.positions != "rotary":
            self.text_pos = nn.Embedding(config.text_length, config.dim)
        if config.positions == "flat":
            self.image_pos = nn.Embedding(self.num_image_tokens, config.dim)
        elif config.positions != "rotary":
            self.row_pos = nn.Embedding(self.grid_size, config.dim)
            self.col_pos = nn.Embedding(self.grid_size, config.dim)
        if config.any_order:
            self.target_pos = nn.Embedding(self.num_image_tokens, config.dim)
        self.transformer = Transformer(config)
        self.text_head: Linear | None = None
        if not config.text_features:
            self.text_head = Linear(config.dim, self.text_emb.num_embeddings, bias=config.biased_heads)
        self.image_head = Linear(config.dim, self.codebook_size, bias=config.biased_heads)
        self.init_weights()
        if config.tie_embeddings:
            self.image_head.weight = self.image_emb.weight
            if self.text_head is not None:
                self.text_head.weight = self.text_emb.weight

        text_length = config.text_length
        self.patterns = list(dict.fromkeys(config.attn_types))
        masks = [
            pattern_mask(
                p, text_length, self.grid_size, semantics=config.foreign.attn_semantics, kernel=config.conv_kernel
            )
            for p in self.patterns
        ]
        self.register_buffer("masks", torch.stack(masks), persistent=False)
        turns = rotary_turns(text_length, self.grid_size, config.head_dim, config.foreign.rotary)
        self.register_buffer("rotary", turns, persistent=False)
        self._layouts: tuple[torch.device, dict[str, Layout]] | None = None

    def init_weights(self) -> None:
        """N(0, 0.02) for embeddings and linear layers, residual outputs scaled by 1 / sqrt(2 depth) (GPT-2)."""
        for name, module in self.named_modules():
            if name.startswith(("vae.", "text_encoder.")):
                continue
            if isinstance(module, nn.Linear):
                std = 0.02 / (2 * self.config.depth) ** 0.5 if name.endswith("to_out") else 0.02
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if self.bos is not None:
            nn.init.normal_(self.bos, std=0.02)

    def views(self) -> list[StreamView]:
        """What each layer sees when all positions are there."""
        config, text_length = self.config, self.config.text_length
        turns = self.rotary if config.rotated else None
        shifts = (text_length, self.grid_size) if config.shift_tokens else None
        layouts = self.layouts()
        return [
            StreamView(self.mask(layer), layouts[self.pattern(layer)], turns, shifts) for layer in range(config.depth)
        ]

    def layouts(self) -> dict[str, Layout]:
        """What each pattern computes of the whole stream; the tables are the model's, and follow it to a device."""
        config = self.config
        device = self.masks.device if self.masks.device.type != "meta" else torch.device("cpu")  # a plan's skeleton
        if self._layouts is None or self._layouts[0] != device:
            length = config.text_length + self.num_image_tokens - 1  # the last image token predicts nothing
            semantics, kernel = config.foreign.attn_semantics, config.conv_kernel
            with torch.inference_mode(False):  # tables that sampling made serve training, too
                tables = {
                    pattern: layout(
                        pattern, config.text_length, self.grid_size, length, semantics=semantics, kernel=kernel
                    ).on(device)
                    for pattern in self.patterns
                }
            self._layouts = device, tables
        return self._layouts[1]

    def __getstate__(self) -> dict[str, Any]:
        """All but the layouts: a copy makes its own, and FlexAttention's masks cannot be pickled."""
        return {**super().__getstate__(), "_layouts": None}

    def pattern(self, layer: int) -> str:
        """Attention pattern of a layer."""
        return self.config.attn_types[layer % len(self.config.attn_types)]

    def mask(self, layer: int) -> Bool[Tensor, "s s"] | None:
        """Pattern mask of a layer; None where it is plainly causal."""
        pattern = self.pattern(layer)
        return None if pattern == "full" else self.masks[self.patterns.index(pattern)]

    def pad_text(self, text_tokens: Int[Tensor, "b given"], *, wait: bool = True) -> Int[Tensor, "b t"]:
        """Ids with every 0 replaced by the pad id of its position; shorter captions are filled up. Makes a copy.

        Args:
            text_tokens: ids in [0, text_vocab_size), 0 = padding; at most text_len of them.
            wait: for the check of the ids on a GPU, see ``checks.require``.

        Raises:
            ValueError: more tokens than ``text_len``, or an id outside the vocabulary; names the numbers.
        """
        self.check_text_tokens(text_tokens, wait=wait)
        config = self.config
        text = F.pad(text_tokens, (0, config.text_len - text_tokens.shape[1]))
        pads = config.text_vocab_size + torch.arange(config.text_len, device=text.device) % config.num_pads
        return torch.where(text == 0, pads, text)

    def embed(
        self,
        padded_text: Int[Tensor, "b t"],
        image_tokens: Int[Tensor, "b m"] | None = None,
        order: Int[Tensor, "*b n"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Inputs of <bos>, the text and the first m image tokens.

        Args:
            padded_text: from ``pad_text``.
            image_tokens: in the order given.
            order: raster positions of all image tokens, with ``any_order``; None = raster order.
        """
        if self.text_encoder is None:
            x = self.text_emb(padded_text)
        else:
            words = padded_text < self.config.text_vocab_size
            features = self.text_encoder.encode(torch.where(words, padded_text, 0))
            pads = self.text_emb((padded_text - self.config.text_vocab_size).clamp_min(0))
            x = torch.where(features.present[..., None], self.text_proj(features.values.to(pads.dtype)), pads)
        if self.bos is not None:
            x = torch.cat([self.bos.expand(len(x), 1, -1), x], dim=1)
        if self.config.positions != "rotary":
            x = x + self.text_pos.weight
        if order is None:
            order = torch.arange(self.num_image_tokens, device=x.device)
        if self.config.any_order:  # the last position of the text predicts the first image token
            x = torch.cat([x[:, :-1], x[:, -1:] + self.target_pos(order[..., :1])], dim=1)
        if image_tokens is not None and image_tokens.shape[1]:
            count = image_tokens.shape[1]
            image = self.embed_image(image_tokens, order[..., :count], order[..., 1 : count + 1])
            x = torch.cat([x, image], dim=1)
        return x

    def embed_image(
        self, image_tokens: Int[Tensor, "b m"], positions: Int[Tensor, "*b m"], targets: Int[Tensor, "*b m"]
    ) -> Float[Tensor, "b m d"]:
        """Inputs of image tokens at some raster positions, and which ones they are to predict."""
        x = self.image_emb(image_tokens)
        if self.config.any_order:
            x = x + self.target_pos(targets)
        if self.config.positions == "flat":
            return x + self.image_pos(positions)
        if self.config.positions != "rotary":
            x = x + self.row_pos(positions // self.grid_size) + self.col_pos(positions % self.grid_size)
        return x

    @property
    def has_text_head(self) -> bool:
        """Whether captions are predicted, too."""
        return self.text_head is not None

    def train(self, mode: bool = True) -> "DALLE":
        """Switch the network's mode; image tokenizer and text encoder stay in eval mode."""
        super().train(mode)
        if self.text_encoder is not None:
            self.text_encoder.eval()
        return self

    @property
    def trunk(self) -> Transformer:
        """The transformer."""
        return self.transformer

    @property
    def prompt_length(self) -> int:
        """The <bos> and the text."""
        return self.config.text_length

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.config.kv_heads or self.config.heads

    @property
    def key_width(self) -> int:
        """Channels of a position's keys in a layer."""
        return self.key_heads * self.config.head_dim

    def read_prompt(
        self,
        text_tokens: Int[Tensor, "g given"],
        trunk: nn.Module,
        order: Int[Tensor, " n"],
        *,
        dtype: torch.dtype,
        trim: bool,
    ) -> tuple[Float[Tensor, "g p d"], dict[str, Any]]:
        """Inputs of the <bos> and the text, whose pads all count; see ``TextToImage``."""
        return self.embed(self.pad_text(text_tokens), order=order), {}

    def hidden(
        self,
        text_tokens: Int[Tensor, "b given"],
        image_tokens: Int[Tensor, "b m"],
        order: Int[Tensor, "b n"] | None = None,
    ) -> tuple[Int[Tensor, "b t"], Float[Tensor, "b q d"]]:
        """Padded text and the transformer's outputs; the last image token, which predicts nothing, is not read.

        Args:
            text_tokens: ids in [0, text_vocab_size), 0 = padding.
            image_tokens: the first m tokens of the order.
            order: raster positions of all image tokens; None = raster order.
        """
        self.check_image_tokens(image_tokens, wait=False)
        padded = self.pad_text(text_tokens, wait=False)
        inputs = self.embed(padded, image_tokens[:, : self.num_image_tokens - 1], order)
        return padded, self.transformer(inputs, reordered(self.views(), self.config.text_length, order))

    def logits(self, text_tokens: Int[Tensor, "b given"], image_tokens: Int[Tensor, "b m"]) -> DALLELogits:
        """Scores of every text and image token given those before it.

        Args:
            text_tokens: ids in [0, text_vocab_size), 0 = padding; at most text_len of them.
            image_tokens: the first m tokens, 0 <= m <= n.

        Returns:
            Text logits ``[b, p, v]`` and image logits ``[b, min(m + 1, n), k]``.
        """
        _, h = self.hidden(text_tokens, image_tokens)
        last = self.config.text_length - 1  # the last text position predicts the first image token
        text = None if self.text_head is None else self.text_head(h[:, :last])
        return DALLELogits(text, self.image_head(h[:, last:]))

    def image_logits(
        self, text_tokens: Int[Tensor, "b given"], image_tokens: Int[Tensor, "b m"]
    ) -> Float[Tensor, "b q k"]:
        """The image logits of ``logits`` alone."""
        _, h = self.hidden(text_tokens, image_tokens)
        return self.image_head(h[:, self.config.text_length - 1 :])

    def image_nll(self, text_tokens: Int[Tensor, "b given"], image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Nats of each image token given the caption and those before it; see ``TextToImage``."""
        self.check_pairs(text_tokens, image_tokens)
        _, h = self.hidden(text_tokens, image_tokens)
        return self.image_nats(h, image_tokens)

    def image_nats(self, h: Float[Tensor, "b q d"], image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n"]:
        """Nats of each image token from the transformer's outputs."""
        h = h[:, self.config.text_length - 1 :]  # the last text position predicts the first image token
        return linear_nats(h.flatten(0, 1), self.image_head, image_tokens.flatten()).view_as(image_tokens)

    def text_nll(self, text_tokens: Int[Tensor, "b given"]) -> TextNLL:
        """Nats of each caption token given those before it; see ``TextToImage``. Without <bos> the first has none."""
        if self.text_head is None:
            return super().text_nll(text_tokens)
        padded, h = self.hidden(text_tokens, text_tokens.new_empty(len(text_tokens), 0))
        targets, counted = self.text_targets(padded)
        nats = linear_nats(h[:, :-1].flatten(0, 1), self.text_head, targets.flatten()).view_as(targets)
        return TextNLL(nats * counted, counted)

    def text_targets(self, padded_text: Int[Tensor, "b t"]) -> tuple[Int[Tensor, "b p"], Bool[Tensor, "b p"]]:
        """The text tokens that are predicted, and which of them count.

        The caption and the one pad that ends it: later pads are certain and would only water the mean down.
        """
        targets = padded_text[:, self.config.text_len - (self.config.text_length - 1) :]
        is_pad = targets >= self.config.text_vocab_size
        return targets, ~is_pad | (is_pad & (is_pad.cumsum(dim=1) == 1))

    def next_text_scores(self, text_tokens: Int[Tensor, "b given"]) -> Float[Tensor, "b v"]:
        """Scores of the token that follows a caption; see ``TextToImage``.

        Raises:
            UserError: an empty caption given to a model without <bos>.
        """
        config, given = self.config, text_tokens.shape[1]
        if self.text_head is None:
            return super().next_text_scores(text_tokens)
        if not given and self.bos is None:
            raise UserError("this dalle has no <bos>, so it cannot begin a caption: give its first word")
        inputs = self.embed(self.pad_text(text_tokens))[:, : given + int(config.foreign.bos)]
        scores = self.text_head(self.transformer(inputs, self.views())[:, -1])
        # a caption goes on with a token, or ends with the pad of this position: id 0 and other pads are never next
        end = config.text_vocab_size + given % config.num_pads
        return torch.cat([scores[:, end, None], scores[:, 1 : config.text_vocab_size]], dim=1)

    def loss(
        self,
        text_tokens: Int[Tensor, "b given"],
        image_tokens: Int[Tensor, "b n"],
        *,
        image_targets: Float[Tensor, "b n k"] | None = None,
        wrong_text: Int[Tensor, "b given"] | None = None,
        order: Int[Tensor, "b n"] | None = None,
        generator: torch.Generator | None = None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> Losses:
        """Cross entropy of a batch of captioned pictures, in training with the z-loss; inputs are not changed.

        With wrong captions the contrastive loss is added, the mean over pictures of softplus(-s m): m is by how many
        nats a token the own caption explains a picture better than the wrong one, s is config.contrast_scale. A picture
        whose caption was dropped, or whose wrong caption is its own, has none.

        Args:
            text_tokens: ids in [0, text_vocab_size), 0 = padding; at most text_len of them.
            image_tokens: all n tokens, raster order.
            image_targets: probabilities of the codes at each position, to be predicted in place of ``image_tokens``;
                the loss is then at least their entropy. (The contrast is of ``image_tokens`` all the same.)
            wrong_text: a caption for each picture that is not its own, ids as in ``text_tokens``.
            order: the raster positions of each picture in the order in which its tokens are read and predicted, with
                ``any_order``; None = raster order.
            generator: for caption_dropout and token_dropout (training mode only); None = torch's global one.
            mean: averages a number over the processes that share a batch. The text loss is then divided by their mean
                number of caption tokens, so that the mean of the processes' losses is the loss of the whole batch.

        Source:
            Contrast: Chen et al. 2024, https://arxiv.org/abs/2410.09347, who tune a finished model so in place of
            guidance. Deviations: no frozen reference model, one logistic of the difference in place of two, beside the
            cross entropy, per token.

        Raises:
            ValueError: shapes or ids that do not fit; names the numbers.
        """
        self.check_pairs(text_tokens, image_tokens)
        expected = (*image_tokens.shape, self.codebook_size)
        if image_targets is not None and image_targets.shape != expected:
            raise ValueError(f"image_targets of shape {tuple(image_targets.shape)} given, {expected} expected")
        if wrong_text is not None and wrong_text.shape != text_tokens.shape:
            raise ValueError(
                f"wrong_text of shape {tuple(wrong_text.shape)} given, text_tokens has {tuple(text_tokens.shape)}"
            )
        if order is not None:
            if not self.config.any_order:
                raise ValueError("an order given to a model without any_order")
            image_tokens = image_tokens.gather(1, order)
            image_targets = None if image_targets is None else image_targets.take_along_dim(order[..., None], dim=1)
        text_tokens, inputs = self.corrupt(text_tokens, image_tokens, generator)
        contrast = None
        if wrong_text is None:
            padded, h = self.hidden(text_tokens, inputs, order)
        else:
            orders = None if order is None else torch.cat([order, order])
            padded, h = self.hidden(torch.cat([text_tokens, wrong_text]), torch.cat([inputs, inputs]), orders)
            (padded, _), (h, wrong_h) = padded.chunk(2), h.chunk(2)
            counted = (text_tokens != wrong_text).any(dim=1) & text_tokens.any(dim=1)
            contrast = self.contrast(h, wrong_h, image_tokens, counted)
        last = self.config.text_length - 1
        targets, counted = self.text_targets(padded)
        # Chowdhery et al. 2022 (PaLM), section 5; validation reports the plain cross entropy
        z_loss = self.config.z_loss if self.training else 0.0
        text = None
        if self.text_head is not None:
            # weighted and not indexed by the mask, for which a GPU would have to be waited for
            text = linear_cross_entropy(
                h[:, :last].flatten(0, 1), self.text_head, targets.flatten(), z_loss=z_loss, counted=counted.flatten()
            )
            if mean is not None:
                count = counted.sum().float()
                text = text * (count / mean(count))
        goal = image_tokens.flatten() if image_targets is None else image_targets.flatten(0, 1)
        image = linear_cross_entropy(h[:, last:].flatten(0, 1), self.image_head, goal, z_loss=z_loss)
        weight = self.config.loss_img_weight
        loss = image if text is None else (text + weight * image) / (1 + weight)
        if contrast is not None:
            loss = loss + self.config.contrast_weight * contrast
        return Losses(loss, image, text, contrast)

    def contrast(
        self,
        h: Float[Tensor, "b q d"],
        wrong_h: Float[Tensor, "b q d"],
        image_tokens: Int[Tensor, "b n"],
        counted: Bool[Tensor, " b"],
    ) -> Float[Tensor, ""]:
        """Contrastive loss from the transformer's outputs under right and wrong captions; see ``loss``.

        Args:
            h: outputs under the right captions.
            wrong_h: outputs under the wrong ones.
            image_tokens: all n tokens.
            counted: which pictures count.
        """
        right, wrong = (self.image_nats(x, image_tokens) for x in (h, wrong_h))
        margin = (wrong - right).mean(dim=1)
        return (F.softplus(-self.config.contrast_scale * margin) * counted).mean()

    def corrupt(
        self, text_tokens: Int[Tensor, "b given"], image_tokens: Int[Tensor, "b n"], generator: torch.Generator | None
    ) -> tuple[Int[Tensor, "b given"], Int[Tensor, "b n"]]:
        """Captions and input tokens after caption_dropout and token_dropout; copies, and unchanged in eval mode."""
        config = self.config
        source = {"generator": generator, "device": "cpu" if generator is None else generator.device}
        if self.training and config.caption_dropout:
            draw = torch.rand(text_tokens.shape[0], 1, **source).to(text_tokens.device)
            text_tokens = torch.where(draw < config.caption_dropout, 0, text_tokens)
        if self.training and config.token_dropout:
            draw = torch.rand(image_tokens.shape, **source).to(image_tokens.device)
            noise = torch.randint(self.codebook_size, image_tokens.shape, **source).to(image_tokens.device)
            image_tokens = torch.where(draw < config.token_dropout, noise, image_tokens)
        return text_tokens, image_tokens
