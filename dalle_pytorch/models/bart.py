"""The encoder and the decoder of DALL·E mini and mega: what dalle_bart.py builds on.

Source: github.com/borisdayma/dalle-mini, model/modeling.py, in the one form that was released: BART (Lewis et al. 2019,
https://arxiv.org/abs/1910.13461) with the norms of NormFormer (Shleifer et al. 2021, https://arxiv.org/abs/2110.09456),
gated feed-forwards (Shazeer 2020, https://arxiv.org/abs/2002.05202) and no biases in linear layers.

Axes: g prompts, c candidates of a prompt, r = g * c rows in that order, t text positions, q positions of this call,
h heads, e head_dim, d dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.models.attention import EncoderView, LayerView
from dalle_pytorch.models.linear import Linear

EPS = 1e-5  # of every norm, as in dalle-mini


@dataclass(kw_only=True)
class BartConfig:
    """Shape of an encoder and a decoder; the defaults are DALL·E mini's."""

    dim: int = 1024
    """Width of both (mega: 2048)."""
    encoder_layers: int = 12
    """Blocks over the caption (mega: 24)."""
    decoder_layers: int = 12
    """Blocks over the image tokens (mega: 24)."""
    heads: int = 16
    """Attention heads (mega: 32); 64 channels each in both models."""
    ffn_dim: int = 2730
    """Width inside the gated feed-forward (mega: 4096)."""
    dropout: float = 0.0
    """On embeddings and on every branch's output, training only; in [0, 1)."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: memory independent of depth but for one tensor a block."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        at_least_one(self, "dim", "encoder_layers", "decoder_layers", "heads", "ffn_dim")
        if self.dim % self.heads:
            raise UserError(f"dim ({self.dim}) must be divisible by heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout}")


class ShiftNorm(nn.Module):
    """Layer norm with a bias and no scale, where the linear layer that follows has the scale in it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "r q d"]) -> Float[Tensor, "r q d"]:
        """Same shape in and out."""
        return F.layer_norm(x, self.bias.shape, None, self.bias, EPS)


class SelfAttention(nn.Module):
    """Attention of positions to those that the layer's view shows."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_qkv = Linear(config.dim, 3 * config.dim, bias=False)
        self.to_out = Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "r q d"], view: LayerView) -> Float[Tensor, "r q d"]:
        """Same shape in and out."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [r, h, q, e]
        return self.to_out(view.attend(q, k, v, stable=False).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of image positions to the caption."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.to_q = Linear(config.dim, config.dim, bias=False)
        self.to_kv = Linear(config.dim, 2 * config.dim, bias=False)
        self.to_out = Linear(config.dim, config.dim, bias=False)

    def keys(self, memory: Float[Tensor, "g t d"]) -> Float[Tensor, "g 2 h t e"]:
        """Keys and values of captions."""
        return self.to_kv(memory).unflatten(-1, (2, self.heads, -1)).permute(0, 2, 3, 1, 4)

    def forward(
        self, x: Float[Tensor, "r q d"], keys: Float[Tensor, "g 2 h t e"], visible: Bool[Tensor, "g t"]
    ) -> Float[Tensor, "r q d"]:
        """Candidates of a prompt are as many more queries, so that its keys are stored and read once."""
        (rows, length, _), groups = x.shape, len(visible)
        q = self.to_q(x).view(groups, -1, length, self.heads, x.shape[-1] // self.heads)  # [g, c, q, h, e]
        q = q.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [g, h, c * q, e]
        k, v = keys.unbind(dim=1)
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=visible[:, None, None])
        out = out.unflatten(2, (-1, length)).permute(0, 2, 3, 1, 4)
        return self.to_out(out.reshape(rows, length, -1).to(x.dtype))


class GatedFeedForward(nn.Module):
    """Feed-forward gated by a second product, with a norm in front and one inside."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.norm, self.hidden_norm = ShiftNorm(config.dim), ShiftNorm(config.ffn_dim)
        self.to_hidden = Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.to_out = Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "r q d"]) -> Float[Tensor, "r q d"]:
        """Same shape in and out."""
        gate, value = self.to_hidden(self.norm(x)).chunk(2, dim=-1)
        return self.to_out(self.hidden_norm(F.gelu(gate) * value))


class Block(nn.Module):
    """The branches that encoder and decoder share: self-attention and a feed-forward, a norm before and after."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attn_norm, self.attn_post = ShiftNorm(config.dim), nn.LayerNorm(config.dim, eps=EPS)
        self.attention = SelfAttention(config)
        self.feed_forward = GatedFeedForward(config)

    def attend(self, x: Float[Tensor, "r q d"], view: LayerView) -> Float[Tensor, "r q d"]:
        """The attention branch, added."""
        return x + drop(self.attn_post(self.attention(self.attn_norm(x), view)), self.dropout, self.training)

    def feed(self, x: Float[Tensor, "r q d"]) -> Float[Tensor, "r q d"]:
        """The feed-forward branch, added."""
        return x + drop(self.feed_forward(x), self.dropout, self.training)


class EncoderBlock(Block):
    """Self-attention, feed-forward."""

    def forward(self, x: Float[Tensor, "r q d"], view: LayerView) -> Float[Tensor, "r q d"]:
        """One block over the positions that the view shows it."""
        return self.feed(self.attend(x, view))


class DecoderBlock(Block):
    """Self-attention, attention to the caption, feed-forward."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        self.cross_norm, self.cross_post = ShiftNorm(config.dim), nn.LayerNorm(config.dim, eps=EPS)
        self.cross_attention = CrossAttention(config)

    def forward(
        self,
        x: Float[Tensor, "r q d"],
        view: LayerView,
        captions: Float[Tensor, "g 2 h t e"] | Float[Tensor, "g t d"],
        visible: Bool[Tensor, "g t"],
    ) -> Float[Tensor, "r q d"]:
        """One block over the positions that the view shows it, and over the visible ones of the caption."""
        x = self.attend(x, view)
        # made here, inside forward: of sharded weights those of this block are there now only
        keys = captions if captions.ndim == 5 else self.cross_attention.keys(captions)
        branch = self.cross_post(self.cross_attention(self.cross_norm(x), keys, visible))
        return self.feed(x + drop(branch, self.dropout, self.training))


class Encoder(nn.Module):
    """Captions to what the decoder attends to."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.norm = ShiftNorm(config.dim)

    def forward(self, x: Float[Tensor, "g t d"], visible: Bool[Tensor, "g t"]) -> Float[Tensor, "g t d"]:
        """Run the stack; outputs at invisible positions mean nothing."""
        view = EncoderView(visible[:, None, None])
        for block in self.blocks:
            x = run(self.config, block, x, view)
        return self.norm(x)


class Decoder(nn.Module):
    """Image positions, one after the other or all at once, to what the head reads."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.decoder_layers))
        self.norm = ShiftNorm(config.dim)

    def keys(self, memory: Float[Tensor, "g t d"]) -> list[Float[Tensor, "g 2 h t e"]]:
        """Keys and values of captions in every layer: the same at every image position."""
        return [cast(DecoderBlock, block).cross_attention.keys(memory) for block in self.blocks]

    def forward(
        self,
        x: Float[Tensor, "r q d"],
        captions: Sequence[Float[Tensor, "g 2 h t e"]] | Float[Tensor, "g t d"],
        visible: Bool[Tensor, "g t"],
        views: Sequence[LayerView],
    ) -> Float[Tensor, "r q d"]:
        """Run the stack.

        Args:
            x: inputs; the rows of a prompt's candidates lie together.
            captions: the encoder's output, from which each block makes its keys, as in training; or their ``keys``,
                made once for many positions. Read once for all candidates.
            visible: caption positions that may be attended to.
            views: what each layer's self-attention sees; of each only ``attend`` is called.
        """
        each = [captions] * len(self.blocks) if isinstance(captions, Tensor) else captions
        for block, view, caption in zip(self.blocks, views, each, strict=True):
            x = run(self.config, block, x, view, caption, visible)
        return self.norm(x)


def run(config: BartConfig, block: nn.Module, *inputs: Any) -> Float[Tensor, "r q d"]:
    """A block's output, to be computed again in the backward pass where the config says so."""
    if config.checkpoint_activations and block.training:
        return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False))
    return block(*inputs)


def drop(x: Float[Tensor, "r q d"], dropout: float, training: bool) -> Float[Tensor, "r q d"]:
    """Dropout, which is free where there is none."""
    return F.dropout(x, dropout) if training and dropout else x
