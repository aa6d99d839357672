"""Attention over one stream of text and image positions: the patterns, rotary positions and what a layer sees.

A stream is ``text_length`` text positions (the <bos> included) and then the image tokens in raster order. Every image
position sees the whole text; the text is causal; a pattern says which earlier image positions an image position sees.

Axes: b batch, s stream positions, q queries, k keys, h heads, e head_dim, d model width.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
SEMANTICS = ("paper", "dalle_pytorch")


def pattern_mask(
    pattern: str, text_length: int, grid_size: int, *, semantics: str = "paper", kernel: int = 11
) -> Bool[Tensor, "s s"]:
    """Which key each query may read, True = visible; never the future.

    Args:
        pattern: "full" (all that came before), "axial_row", "axial_col" or "conv_like".
        text_length: text positions in front of the image, the <bos> included.
        grid_size: token rows = columns, w below.
        semantics: "paper": row = itself and the previous w tokens in raster order, across row borders; convolution =
            the causal half of a centred kernel, wrapping around row borders. "dalle_pytorch": row = earlier tokens of
            the same row; convolution = the kernel x kernel tokens up and to the left, without wrap. Columns are alike.
        kernel: side of the convolution's kernel, odd for "paper".

    Returns:
        ``[s, s]`` with s = text_length + grid_size ** 2.

    Raises:
        ValueError: unknown pattern or semantics, or an even kernel under "paper".

    Source:
        Ramesh et al. 2021, appendix B.1 (rows, columns, 11 x 11 convolution); DALLE-pytorch 1.6.6, attention.py.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"attention pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    if semantics not in SEMANTICS:
        raise ValueError(f"attn_semantics must be one of {', '.join(SEMANTICS)}, got {semantics!r}")
    if semantics == "paper" and kernel % 2 == 0:
        raise ValueError(f"conv_kernel must be odd to have a centre, got {kernel}")
    length = text_length + grid_size**2
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if pattern == "full":
        return causal

    position = torch.arange(grid_size**2)
    row, col = position // grid_size, position % grid_size
    behind = position[:, None] - position[None, :]  # how far the key lies behind the query in raster order
    if pattern == "axial_col":
        visible = col[:, None] == col[None, :]
    elif pattern == "axial_row":
        visible = behind <= grid_size if semantics == "paper" else row[:, None] == row[None, :]
    elif semantics == "paper":
        half = kernel // 2
        # offset = up * w + left with up in 0..half, left in -half..half: raster arithmetic wraps at the borders
        offsets = {up * grid_size + left for up in range(half + 1) for left in range(-half, half + 1)}
        visible = torch.isin(behind, torch.tensor(sorted(offsets)))
    else:
        up, left = row[:, None] - row[None, :], col[:, None] - col[None, :]
        visible = (up >= 0) & (up < kernel) & (left >= 0) & (left < kernel)
    mask = causal.clone()
    mask[text_length:, text_length:] &= visible
    return mask


def rotary_turns(text_length: int, grid_size: int, head_dim: int) -> Float[Tensor, "2 s e"]:
    """Cosine and signed sine of every position's rotation: text index, token row and column, a third of the pairs each.

    (x, y) turns to (x cos - y sin, y cos + x sin): the sines come negative for the first of a pair.

    Text positions are (index, 0, 0), image positions (text_length, row, column), so that attention between image
    tokens depends on their distance in rows and columns only. Base 10,000 for text, 100 for the short axes of the grid
    (two octaves of base 10,000 would be flat over 32 rows).

    Source:
        Su et al. 2021, https://arxiv.org/abs/2104.09864; the thirds are DALLE-pytorch's.
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
    angle = torch.cat(angles, dim=-1)
    cosine = angle.cos().repeat_interleave(2, dim=-1)
    sine = torch.stack([-angle.sin(), angle.sin()], dim=-1).flatten(-2)
    return torch.stack([cosine, sine])  # not the angles: half precision would lose them


def rotate(x: Float[Tensor, "b q *h e"], turns: Float[Tensor, "2 q e"]) -> Float[Tensor, "b q *h e"]:
    """Rotate neighbouring pairs of the last axis by the angles of ``rotary_turns``."""
    cosine, sine = turns.to(x.dtype).reshape(2, turns.shape[1], *(1,) * (x.ndim - 3), turns.shape[2])
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cosine, swapped, sine)


@runtime_checkable
class LayerView(Protocol):
    """How a layer sees its positions and those before them: all at once in training, through a cache in sampling."""

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """Input of attention (0) or feed-forward (1), with channels of earlier positions where the model shifts."""
        ...

    def turn(self, x: Float[Tensor, "b q two h e"]) -> Float[Tensor, "b q two h e"]:
        """Queries and keys, rotated where the model has rotary positions."""
        ...

    def attend(
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b h q e"], v: Float[Tensor, "b h q e"], stable: bool
    ) -> Float[Tensor, "b h q e"]:
        """Values weighted by attention to all that each query may see."""
        ...


@dataclass
class EncoderView:
    """Everything sees everything, or what a mask lets through; no order."""

    mask: Bool[Tensor, "..."] | None = None
    """Broadcasts to [b, h, q, q], True = visible."""

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """Unchanged."""
        return x

    def turn(self, x: Float[Tensor, "b q two h e"]) -> Float[Tensor, "b q two h e"]:
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
    turns: Float[Tensor, "2 s e"] | None
    """``rotary_turns``, or None."""
    sources: tuple[Tensor, Tensor] | None
    """``shift_sources``, or None."""

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """The first two channel quarters replaced by those of ``sources``."""
        if self.sources is None:
            return x
        quarter, length = x.shape[-1] // 4, x.shape[1]
        past = F.pad(x[..., : 2 * quarter], (0, 0, 0, 1))  # index -1 reads the zeros at the end
        first, second = (source[:length] for source in self.sources)
        return torch.cat([past[:, first, :quarter], past[:, second, quarter:], x[..., 2 * quarter :]], dim=-1)

    def turn(self, x: Float[Tensor, "b q two h e"]) -> Float[Tensor, "b q two h e"]:
        """Rotated by the angles of the positions."""
        return x if self.turns is None else rotate(x, self.turns[:, : x.shape[1]])

    def attend(
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b h q e"], v: Float[Tensor, "b h q e"], stable: bool
    ) -> Float[Tensor, "b h q e"]:
        """Attention under the pattern."""
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
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, *, dropout: float = 0.0, stable: bool = False, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.stable, self.dropout = heads, head_dim, stable, dropout
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim)
        self.qk_norm = qk_norm

    def forward(self, x: Float[Tensor, "b q d"], view: LayerView) -> Float[Tensor, "b q d"]:
        """Attend to what the view lets this layer see."""
        qkv = self.to_qkv(x)
        qkv = qkv.view(*qkv.shape[:2], 3, self.heads, self.head_dim)
        qk = qkv[:, :, :2]
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_dim,))
        q, k = view.turn(qk).permute(2, 0, 3, 1, 4)  # [2, b, h, q, e]
        out = view.attend(q, k, qkv[:, :, 2].transpose(1, 2), self.stable)
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


def shift_sources(text_length: int, grid_size: int) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
    """Stream positions whose first and second channel quarters replace a token's own; -1 = zeros.

    Text: both quarters from the previous token. Image: the first from the token above, the second from the left.

    Source:
        Token shift as in DALLE-pytorch 1.6.6, transformer.py (PreShiftToken).
    """
    text = torch.arange(text_length) - 1
    grid = torch.arange(grid_size**2)
    above = torch.where(grid >= grid_size, text_length + grid - grid_size, -1)
    left = torch.where(grid % grid_size > 0, text_length + grid - 1, -1)
    return torch.cat([text, above]), torch.cat([text, left])
