"""Attention that computes only the blocks of a pattern's mask in which something is visible.

A layout is worked out from the mask alone, once: blocks of neighbouring queries, the runs of keys that each may see,
and the order of positions in which that is least work (column attention is dense along columns). On a CPU the blocks
are computed one after the other, on a GPU by FlexAttention with the same order and mask.

Axes: b batch, h heads, s stream positions, e head_dim, n = b * h.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dalle_pytorch.models.patterns import pattern_mask

FLEX_WIDTH = 16
"""Narrowest head that FlexAttention computes; narrower ones are filled up with zeros."""
BLOCK = 64
"""Queries of a block. Of 64, 128 and 256 the fastest for all patterns at 320 and 1,280 positions on 2 CPU cores: larger
ones compute more that is masked, and what 64 need stays in the cache."""


class Block(NamedTuple):
    """Neighbouring queries and all that they may see."""

    queries: slice
    keys: list[slice]
    """Runs of keys; those that every query sees come first."""
    hidden: Bool[Tensor, "q k"] | None
    """True = not visible, for the last k keys; None = all visible."""


class Layout(NamedTuple):
    """How to compute one pattern over a stream of fixed length."""

    length: int
    blocks: list[Block]
    order: Int[Tensor, " s"] | None
    """Position of the stream that each position of the blocks holds; None = as they are."""
    inverse: Int[Tensor, " s"] | None
    """The way back."""
    mask: Bool[Tensor, "s s"]
    """The pattern in that order, True = visible."""
    share: float
    """Part of all pairs of positions that is computed."""
    flex: BlockMask | None = None
    """The mask as FlexAttention reads it, on a GPU."""

    def on(self, device: torch.device) -> "Layout":
        """This layout with its tables on a device; they live as long as what keeps the result."""
        if device.type == "cpu":
            return self
        place = lambda table: None if table is None else table.to(device)  # noqa: E731
        return self._replace(
            blocks=[block._replace(hidden=place(block.hidden)) for block in self.blocks],
            order=place(self.order),
            inverse=place(self.inverse),
            flex=flex_mask(self.mask, device) if device.type == "cuda" else None,
        )


@functools.cache
def layout(
    pattern: str,
    text_length: int,
    grid_size: int,
    length: int,
    *,
    semantics: str = "paper",
    kernel: int = 11,
) -> Layout:
    """The cheapest layout of a pattern, on the CPU: positions as they are, or the image by columns.

    Args:
        pattern: its name; this and the rest as in ``pattern_mask``.
        text_length: text positions in front of the picture, the <bos> included.
        grid_size: token rows = columns.
        length: positions to compute, from the front of the stream.
        semantics: whose definition.
        kernel: side of the convolution's kernel.
    """
    # on the CPU whatever the default device: a model may be under construction on the meta device
    with torch.device("cpu"):
        mask = pattern_mask(pattern, text_length, grid_size, semantics=semantics, kernel=kernel)[:length, :length]
        grid = torch.arange(grid_size**2).view(grid_size, grid_size)
        by_column = torch.cat([torch.arange(text_length), text_length + grid.T.flatten()])
        by_column = by_column[by_column < length]
        blocks, turned = _blocks(mask), mask[by_column][:, by_column]
        blocks_by_column = _blocks(turned)
        pairs, pairs_by_column = _pairs(blocks), _pairs(blocks_by_column)
        if pairs <= pairs_by_column:
            return Layout(length, blocks, None, None, mask, pairs / length**2)
        share = pairs_by_column / length**2
        return Layout(length, blocks_by_column, by_column, by_column.argsort(), turned, share)


def block_attention(
    q: Float[Tensor, "b h s e"], k: Float[Tensor, "b h s e"], v: Float[Tensor, "b h s e"], layout: Layout
) -> Float[Tensor, "b h s e"]:
    """Attention under a pattern, with gradients; equal to the dense computation up to rounding."""
    if layout.order is not None:
        q, k, v = (x.index_select(2, layout.order) for x in (q, k, v))
    if layout.flex is None:
        out = _BlockAttention.apply(q, k, v, layout.blocks)
    else:
        # inside a program that is being compiled it is part of that; by itself it is a program of its own
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex(q.shape, q.dtype)
        width = q.shape[-1]
        q, k, v = (F.pad(x, (0, max(FLEX_WIDTH - width, 0))) for x in (q, k, v))
        out = flex(q, k, v, block_mask=layout.flex, scale=width**-0.5)[..., :width]
    return out if layout.inverse is None else out.index_select(2, layout.inverse)


class _BlockAttention(torch.autograd.Function):
    """Block after block. The weights of attention are not kept for the backward pass but computed again.

    The recomputation is that of FlashAttention (Dao et al. 2022, section 3.1); with whole rows of keys there is no
    running softmax.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[Block]) -> Tensor:
        """Attention of every block."""
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out = torch.empty_like(q)
        for block in blocks:
            weights = _weights(q[:, block.queries], _take(k, block.keys), block.hidden)
            torch.bmm(weights, _take(v, block.keys), out=out[:, block.queries])
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.shape = blocks, shape
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        """Gradients of queries, keys and values."""
        q, k, v = ctx.saved_tensors
        gradient = gradient.reshape(q.shape)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))  # sums over blocks
        for block in ctx.blocks:
            keys, values, upper = _take(k, block.keys), _take(v, block.keys), gradient[:, block.queries]
            weights = _weights(q[:, block.queries], keys, block.hidden)
            _give(dv, block.keys, weights.transpose(1, 2) @ upper)
            # the softmax's own backward: weights * (g - sum(g * weights)), in one pass
            scores = torch._softmax_backward_data(upper @ values.transpose(1, 2), weights, -1, weights.dtype)
            torch.bmm(scores, keys, out=dq[:, block.queries])
            _give(dk, block.keys, scores.transpose(1, 2) @ q[:, block.queries])
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = (x.to(q.dtype).view(ctx.shape) for x in (dq.mul_(scale), dk.mul_(scale), dv))
        return dq, dk, dv, None


def _weights(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax of the scores of one block, ``[n, queries, keys]``."""
    start = q.new_empty(()).expand(q.shape[0], q.shape[1], k.shape[1])  # beta = 0: not read
    scores = torch.baddbmm(start, q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    if hidden is not None:
        scores[:, :, -hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    return scores.softmax(dim=-1)


def _take(x: Tensor, runs: list[slice]) -> Tensor:
    """Some positions of ``[n, s, e]``, side by side."""
    return x[:, runs[0]] if len(runs) == 1 else torch.cat([x[:, run] for run in runs], dim=1)


def _give(x: Tensor, runs: list[slice], values: Tensor) -> None:
    """Add to some positions of ``[n, s, e]``."""
    for run, part in zip(runs, values.split([run.stop - run.start for run in runs], dim=1), strict=True):
        x[:, run] += part


def _blocks(mask: Tensor) -> list[Block]:
    """Blocks of queries of a mask ``[s, s]``."""
    blocks = []
    for start in range(0, len(mask), BLOCK):
        part = mask[start : start + BLOCK]
        seen_by_all = part.all(dim=0)
        partly = _runs(part.any(dim=0) & ~seen_by_all)
        hidden = torch.cat([~part[:, run] for run in partly], dim=1) if partly else None
        keys: list[slice] = []
        for run in _runs(seen_by_all) + partly:
            if keys and keys[-1].stop == run.start:  # one run is read in place, two are copied together
                run = slice(keys.pop().start, run.stop)
            keys.append(run)
        blocks.append(Block(slice(start, start + len(part)), keys, hidden))
    return blocks


def _pairs(blocks: list[Block]) -> int:
    """Pairs of query and key that are computed."""
    return sum((b.queries.stop - b.queries.start) * sum(run.stop - run.start for run in b.keys) for b in blocks)


def _runs(chosen: Tensor) -> list[slice]:
    """Runs of True in a row."""
    edges = torch.diff(chosen.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    return [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]


@functools.cache
def _compiled_flex(shape: torch.Size, dtype: torch.dtype) -> Callable[..., Tensor]:
    """FlexAttention, compiled for one shape and type of queries.

    torch._dynamo keeps the programs of a function with its code object, 8 at most (config.recompile_limit, torch 2.13);
    beyond that it runs FlexAttention uncompiled, which holds all scores. Masks of one size share a program, since
    ``flex_mask`` gives them as tensors; each batch size, type and gradient mode has its own (both counted on a CPU).
    So a copy of the code for each shape and type: only the gradient modes then count towards the limit.
    """
    own = types.FunctionType(
        flex_attention.__code__.replace(), flex_attention.__globals__, argdefs=flex_attention.__defaults__
    )
    own.__kwdefaults__ = flex_attention.__kwdefaults__
    return torch.compile(own, dynamic=False)


def flex_mask(mask: Bool[Tensor, "s s"], device: torch.device) -> BlockMask:
    """A mask as FlexAttention reads it."""
    visible = mask.to(device)
    return create_block_mask(lambda b, h, q, k: visible[q, k], None, None, *mask.shape, device=str(device))
