"""Attention over one stream of text and image positions: the patterns, rotary positions and the key/value cache.

A stream is ``text_length`` text positions (the <bos> included) and then the image tokens in raster order. Every image
position sees the whole text; the text is causal; a pattern says which earlier image positions an image position sees.

Axes: b batch, s stream positions, q queries, k keys, h heads, e head_dim, d model width.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
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
    """Cosine and sine of every position's rotation: text index, token row, token column, a third of the pairs each.

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
    turned = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
    return torch.stack([turned.cos(), turned.sin()])  # not the angles: half precision would lose them


def rotate(x: Float[Tensor, "b h q e"], turns: Float[Tensor, "2 q e"]) -> Float[Tensor, "b h q e"]:
    """Rotate neighbouring pairs of the last axis by the angles of these cosines and sines."""
    cosine, sine = turns.to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * cosine + turned * sine


@dataclass
class LayerCache:
    """Keys, values and shifted halves of one layer, preallocated for the whole stream."""

    keys: Float[Tensor, "b h s e"] | None = None
    values: Float[Tensor, "b h s e"] | None = None
    shifted: dict[str, Float[Tensor, "b s half"]] = field(default_factory=dict)


class Cache:
    """What the transformer remembers of the positions it has read.

    Args:
        depth: layers.
        length: stream positions to make room for.
    """

    def __init__(self, depth: int, length: int) -> None:
        self.layers = [LayerCache() for _ in range(depth)]
        self.length = length
        self.filled = 0
        """Positions read so far."""


class Attention(nn.Module):
    """Multi-head attention with an optional mask, rotary positions and cache.

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

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        *,
        mask: Bool[Tensor, "..."] | None = None,
        causal: bool = False,
        turns: Float[Tensor, "2 q e"] | None = None,
        cache: LayerCache | None = None,
        start: int = 0,
        length: int = 0,
    ) -> Float[Tensor, "b q d"]:
        """Attend.

        Args:
            x: inputs at stream positions ``start`` to ``start + q``.
            mask: broadcasts to [b, h, q, keys], True = visible; None = everything, or causal.
            causal: lower-triangular mask, for ``mask=None``.
            turns: cosines and sines of the rotary angles of the q positions.
            cache: keys and values of the positions before ``start``; extended in place.
            start: first stream position of ``x``.
            length: room to allocate when ``cache`` is empty.
        """
        q, k, v = rearrange(self.to_qkv(x), "b q (three h e) -> three b h q e", three=3, h=self.heads)
        if self.qk_norm:
            q, k = F.rms_norm(q, (self.head_dim,)), F.rms_norm(k, (self.head_dim,))
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        if cache is not None:
            k, v = self.remember(cache, k, v, start, length)
        if self.stable:
            out = stable_attention(q, k, v, mask, causal)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return F.dropout(self.to_out(rearrange(out, "b h q e -> b q (h e)")), self.dropout, self.training)

    @staticmethod
    def remember(
        cache: LayerCache, k: Float[Tensor, "b h q e"], v: Float[Tensor, "b h q e"], start: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values into the cache; all up to now, as views."""
        end = start + k.shape[2]
        if cache.keys is None or cache.values is None:
            cache.keys = k.new_empty(k.shape[0], k.shape[1], length, k.shape[3])
            cache.values = torch.empty_like(cache.keys)
        cache.keys[:, :, start:end] = k
        cache.values[:, :, start:end] = v
        return cache.keys[:, :, :end], cache.values[:, :, :end]


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
