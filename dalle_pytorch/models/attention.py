"""Attention over one stream of text and image positions: rotary positions, token shift and what a layer sees.

``patterns.py`` has the stream and its patterns, ``block_sparse.py`` the computation that follows them.

Axes: b batch, s stream positions, q queries, k keys, h heads, g key heads, e head_dim, d model width.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dalle_pytorch.models.block_sparse import Layout, block_attention
from dalle_pytorch.models.linear import Linear

ROTARIES = ("grid", "dalle_pytorch")


def rotary_turns(text_length: int, grid_size: int, head_dim: int, rotary: str = "grid") -> Float[Tensor, "2 s e"]:
    """Cosine and signed sine of every position's rotation: text index, token row and column, a third of the pairs each.

    (x, y) turns to (x cos - y sin, y cos + x sin): the sines come negative for the first of a pair.

    Args:
        text_length: text positions in front of the image, the <bos> included.
        grid_size: token rows = columns.
        head_dim: width of a head.
        rotary: whose angles, "grid" (see ``grid_angles``) or "dalle_pytorch".

    Source:
        Su et al. 2021, https://arxiv.org/abs/2104.09864; the thirds are DALLE-pytorch's.
    """
    make = grid_angles if rotary == "grid" else dalle_pytorch_angles
    angle = make(text_length, grid_size, head_dim)
    cosine = angle.cos().repeat_interleave(2, dim=-1)
    sine = torch.stack([-angle.sin(), angle.sin()], dim=-1).flatten(-2)
    return torch.stack([cosine, sine])  # not the angles: half precision would lose them


def grid_angles(text_length: int, grid_size: int, head_dim: int) -> Float[Tensor, "s pairs"]:
    """Our angles: those of text by (index, 0, 0), those of image tokens by (text_length, row, column).

    Attention between image tokens so depends on their distance in rows and columns only. Base 10,000 for text, 100 for
    the short axes of the grid (two octaves of base 10,000 would be flat over 32 rows).
    """
    pairs = head_dim // 2
    per_axis = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    grid = torch.arange(grid_size**2)
    coordinates = (
        torch.cat([torch.arange(text_length), torch.full_like(grid, text_length)]),
        torch.cat([torch.zeros(text_length, dtype=torch.long), grid // grid_size]),
        torch.cat([torch.zeros(text_length, dtype=torch.long), grid % grid_size]),
    )
    angles = [
        coordinate[:, None] * base ** (-torch.arange(count) / max(count, 1))
        for coordinate, base, count in zip(coordinates, (10_000.0, 100.0, 100.0), per_axis, strict=True)
    ]
    return torch.cat(angles, dim=-1)


def dalle_pytorch_angles(text_length: int, grid_size: int, head_dim: int) -> Float[Tensor, "s pairs"]:
    """DALLE-pytorch's angles: image tokens stand at 8192 of the text, and text at -10 of a grid over [-1, 1].

    Each axis has a third of the head, rounded down to pairs; what is left over is not turned.

    Source:
        DALLE-pytorch 1.6.6, transformer.py; the frequencies "lang" and "pixel" are rotary-embedding-torch's. Computed
        in the same order: angles up to 8192 show the last bit of a frequency.
    """
    third, tokens = head_dim // 3, grid_size**2
    count = third // 2
    lang = 1.0 / (10_000 ** (torch.arange(0, third, 2)[:count].float() / third))
    pixel = torch.linspace(1.0, 5.0, count) * math.pi
    index = torch.cat([torch.arange(text_length), torch.full((tokens,), 8192)]).float()
    along = torch.linspace(-1, 1, grid_size)
    outside = torch.full((text_length,), -10.0)
    row = torch.cat([outside, along.repeat_interleave(grid_size)])
    column = torch.cat([outside, along.repeat(grid_size)])
    angles = [index[:, None] * lang, row[:, None] * pixel, column[:, None] * pixel]
    return F.pad(torch.cat(angles, dim=-1), (0, head_dim // 2 - 3 * count))


def rotate(x: Float[Tensor, "b q *h e"], turns: Float[Tensor, "2 *b q e"]) -> Float[Tensor, "b q *h e"]:
    """Rotate neighbouring pairs of the last axis by the angles of ``rotary_turns``, those of all rows or of each."""
    cosine, sine = turns.to(x.dtype).reshape(*turns.shape[:-1], *(1,) * (x.ndim - 3), turns.shape[-1])
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cosine, swapped, sine)


def reordered(views: list["StreamView"], text_length: int, order: Int[Tensor, "*b n"] | None) -> list["StreamView"]:
    """Views of image tokens in another order than the raster's, which plainly causal layers can have.

    Args:
        views: of all layers.
        text_length: text positions in front of the image tokens.
        order: raster positions of the image tokens, the same or other ones in each row; None = raster order.
    """
    turns = views[0].turns
    if order is None or turns is None:
        return views
    text = turns[:, :text_length]
    if order.ndim > 1:
        text = text[:, None].expand(-1, len(order), -1, -1)
    turns = torch.cat([text, turns[:, text_length + order]], dim=-2)
    return [replace(view, turns=turns) for view in views]


@runtime_checkable
class LayerView(Protocol):
    """How a layer sees its positions and those before them: all at once in training, through a cache in sampling."""

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """Input of attention (0) or feed-forward (1), with channels of earlier positions where the model shifts."""
        ...

    def turn(self, x: Float[Tensor, "b q heads e"]) -> Float[Tensor, "b q heads e"]:
        """Queries and keys (or values), rotated where the model has rotary positions."""
        ...

    def attend(
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b g q e"], v: Float[Tensor, "b g q e"], stable: bool
    ) -> Float[Tensor, "b h q e"]:
        """Values weighted by attention to all that each query may see; neighbouring heads share a key head."""
        ...


@dataclass
class EncoderView:
    """Everything sees everything, or what a mask lets through; no order."""

    mask: Bool[Tensor, "..."] | None = None
    """Broadcasts to [b, h, q, q], True = visible."""

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """Unchanged."""
        return x

    def turn(self, x: Float[Tensor, "b q heads e"]) -> Float[Tensor, "b q heads e"]:
        """Unchanged."""
        return x

    def attend(
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b h q e"], v: Float[Tensor, "b h q e"], stable: bool
    ) -> Float[Tensor, "b h q e"]:
        """Attention under the mask."""
        return attention(q, k, v, self.mask, causal=False, stable=stable)


@dataclass
class StreamView:
    """The first q positions of a stream, all at once."""

    mask: Bool[Tensor, "s s"] | None
    """``pattern_mask``; None = plainly causal."""
    layout: Layout | None
    """How to compute the pattern at one length; None = under a mask, whatever the length."""
    turns: Float[Tensor, "2 *b s e"] | None
    """``rotary_turns``, of each row where their orders differ, or None."""
    shifts: tuple[int, int] | None
    """Text length and grid size where the model shifts tokens, or None."""

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """As ``shift_tokens``."""
        return x if self.shifts is None else shift_tokens(x, *self.shifts)

    def turn(self, x: Float[Tensor, "b q heads e"]) -> Float[Tensor, "b q heads e"]:
        """Rotated by the angles of the positions."""
        return x if self.turns is None else rotate(x, self.turns[..., : x.shape[1], :])

    def attend(
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b g q e"], v: Float[Tensor, "b g q e"], stable: bool
    ) -> Float[Tensor, "b h q e"]:
        """Attention under the pattern."""
        if q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        # torch's own causal attention is the faster one but for 16 bits on a CPU (benchmarks/training.py)
        fused = self.mask is None and not (v.device.type == "cpu" and v.itemsize == 2)
        if self.layout is not None and q.shape[2] == self.layout.length and not stable and not fused:
            return block_attention(q.to(v.dtype), k.to(v.dtype), v, self.layout)
        mask = None if self.mask is None else self.mask[: q.shape[2], : q.shape[2]]
        return attention(q, k, v, mask, causal=mask is None, stable=stable)


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        dim: width of the input and output.
        heads: number of heads.
        head_dim: width of a head.
        dropout: on the output, training only (on the weights it would rule out the fused kernels).
        stable: divide the scores before the softmax's maximum is taken off (CogView's PB-relax), so that
            they do not overflow in fp16.
        qk_norm: RMS-normalise queries and keys, which bounds the scores; without gains, as in nanochat (with them mixed
            precision leaves the fused kernel).
        qkv_bias: add biases to queries, keys and values.
        rotate_values: rotate values like queries and keys.
        kv_heads: heads of keys and values, a divisor of ``heads``; None = as many.
        bias: add biases to the output.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        dropout: float = 0.0,
        stable: bool = False,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        rotate_values: bool = False,
        kv_heads: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.head_dim, self.stable, self.dropout = head_dim, stable, dropout
        self.to_qkv = Linear(dim, (heads + 2 * self.kv_heads) * head_dim, bias=qkv_bias)
        self.to_out = Linear(heads * head_dim, dim, bias=bias)
        self.qk_norm, self.rotate_values = qk_norm, rotate_values

    def forward(self, x: Float[Tensor, "b q d"], view: LayerView) -> Float[Tensor, "b q d"]:
        """Attend to what the view lets this layer see."""
        turned = self.heads + self.kv_heads
        qk, v = self.to_qkv(x).unflatten(-1, (-1, self.head_dim)).split([turned, self.kv_heads], dim=2)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_dim,))
        qk = view.turn(qk)
        if self.rotate_values:
            v = view.turn(v)
        q, k = qk.transpose(1, 2).split([self.heads, self.kv_heads], dim=1)  # [b, h, q, e]
        out = view.attend(q, k, v.transpose(1, 2), self.stable)
        out = self.to_out(out.transpose(1, 2).flatten(2))
        return F.dropout(out, self.dropout) if self.training else out


def attention(
    q: Float[Tensor, "b h q e"],
    k: Float[Tensor, "b h k e"],
    v: Float[Tensor, "b h k e"],
    mask: Bool[Tensor, "..."] | None,
    *,
    causal: bool,
    stable: bool,
) -> Float[Tensor, "b h q e"]:
    """Scaled dot-product attention, fused or in CogView's stable form."""
    if stable:
        return stable_attention(q, k, v, mask, causal)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def stable_attention(
    q: Float[Tensor, "b h q e"],
    k: Float[Tensor, "b h k e"],
    v: Float[Tensor, "b h k e"],
    mask: Bool[Tensor, "..."] | None,
    causal: bool,
) -> Float[Tensor, "b h q e"]:
    """Attention whose scores are kept small: softmax((s / a - max(s / a)) * a), equal to softmax(s).

    Source:
        CogView, Ding et al. 2021, https://arxiv.org/abs/2105.13290, section 2.4; alpha = 32 as there.
    """
    alpha = 32.0
    scores = (q / (alpha * math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min / alpha)
    weights = ((scores - scores.amax(dim=-1, keepdim=True).detach()) * alpha).softmax(dim=-1)
    return weights @ v


def shift_tokens(x: Float[Tensor, "b q d"], text_length: int, grid_size: int) -> Float[Tensor, "b q d"]:
    """The first two channel quarters replaced by those of neighbours; zeros where there is none.

    Text: both from the previous token. Image: the first from the token above, the second from the token on the left.

    Source:
        Token shift as in DALLE-pytorch 1.6.6, transformer.py (PreShiftToken).
    """
    quarter = x.shape[-1] // 4
    first, second, rest = x.split_with_sizes([quarter, quarter, x.shape[-1] - 2 * quarter], dim=-1)
    text, image = first[:, :text_length], first[:, text_length:]
    above = F.pad(image, (0, 0, grid_size, 0))[:, : image.shape[1]]
    first = torch.cat([F.pad(text, (0, 0, 1, -1)), above], dim=1)
    second = F.pad(second, (0, 0, 1, -1))
    second[:, text_length::grid_size] = 0.0
    return torch.cat([first, second, rest], dim=-1)
