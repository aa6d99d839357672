"""What sampling remembers: each layer's keys and values, and the tokens that token shift looks back at.

A prompt's keys are stored once and shared by all its candidates; a candidate keeps image keys only, and of those only as
many as its layer's pattern can still see. Everything is allocated once. Which slot a position writes and which it reads is
worked out from the pattern's mask beforehand, so a step builds no mask.

Axes: g groups (a prompt, or its null twin for guidance), c candidates of a group, r = g * c rows, h heads, e head_dim,
t text positions with <bos>, n image tokens, m slots of the image cache, d width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.models.attention import StreamView, rotate

BLOCK = 32
"""Image slots stored side by side where many candidates are drawn: what one step reads then lies in few long runs
of memory. At 512 candidates attention took 1.5 times as long with all slots side by side (benchmarks/sampling.py)."""
MANY = 32
"""Rows from which blocks pay: for fewer, more calls cost more than the memory order saves."""


class Plan(NamedTuple):
    """Where a layer keeps its image keys, and which of them each image position sees."""

    slots: list[int]
    """Slot that each raster position writes."""
    reads: list[slice | Int[Tensor, " visible"]]
    """Slots that each raster position sees, itself included."""
    room: int
    """Number of slots."""


def plan(visible: Bool[Tensor, "n n"], pattern: str) -> Plan:
    """Slots of a pattern: a ring as long as it looks back, and for columns one run for each column.

    Args:
        visible: image part of ``pattern_mask``.
        pattern: its name.
    """
    n = len(visible)
    grid_size, position = round(n**0.5), torch.arange(n)
    if pattern == "axial_col":
        room, slots = n, position % grid_size * grid_size + position // grid_size
    else:
        room = int((position - visible.int().argmax(dim=1)).max()) + 1
        slots = position % room
    reads: list[slice | Tensor] = []
    for row in visible:
        read = slots[row].sort().values
        run = int(read[-1] - read[0]) + 1 == len(read)
        reads.append(slice(int(read[0]), int(read[-1]) + 1) if run else read)
    return Plan(slots.tolist(), reads, room)


class LayerCache:
    """Keys and values of one layer, and its view of the stream one position at a time.

    Args:
        plan: slots of its pattern.
        full: keys and values of the prompt and the given image tokens, ``[2, g, h, t + given, e]``.
        text_length: t.
        candidates: c.
    """

    def __init__(self, plan: Plan, full: Float[Tensor, "2 g h s e"], text_length: int, candidates: int) -> None:
        _, groups, heads, length, head_dim = full.shape
        self.plan, self.candidates, self.heads, self.text_length = plan, candidates, heads, text_length
        self.shape = (groups, candidates, heads, head_dim)
        runs = all(isinstance(read, slice) and read.start == 0 for read in plan.reads)
        # a lone candidate of each prompt, its keys in one run: the prompt's lie in front of its own
        self.alone = candidates == 1 and runs
        self.offset = text_length if self.alone else 0
        slots = self.offset + plan.room
        jump = any(not isinstance(read, slice) for read in plan.reads)
        rows = groups * candidates * heads
        self.block = slots if jump or rows < MANY * heads else BLOCK
        blocks = -(-slots // self.block)
        self.blocks = [full.new_empty(2, rows, min(self.block, slots - i * self.block), head_dim) for i in range(blocks)]
        """Image keys and values, rows in the order (g, h, c)."""
        self.prompt = full[:, :, :, :text_length].flatten(1, 2).contiguous()
        """Keys and values of the prompts, ``[2, g * h, t, e]``; empty where they lie in front."""
        if self.alone:
            self.blocks[0][:, :, :text_length] = self.prompt
            self.prompt = self.prompt[:, :, :0].clone()
        given = full[:, :, :, text_length:].flatten(1, 2).repeat_interleave(candidates, dim=1)
        for position in range(max(0, length - text_length - plan.room), length - text_length):
            self.write(given[0, :, position], given[1, :, position], plan.slots[position])

    def write(self, k: Float[Tensor, "rows e"], v: Float[Tensor, "rows e"], slot: int) -> None:
        """Store one position's keys and values."""
        block, at = divmod(self.offset + slot, self.block)
        self.blocks[block][0, :, at] = k
        self.blocks[block][1, :, at] = v

    def read(self, slots: slice | Tensor) -> list[Float[Tensor, "2 rows some e"]]:
        """Keys and values of some slots, as views of the blocks that hold them; picked ones as one copy."""
        if not isinstance(slots, slice):
            return [self.blocks[0].index_select(2, slots)]
        start, stop = slots.start, self.offset + slots.stop
        return [
            block[:, :, max(start - first, 0) : stop - first]
            for first, block in zip(range(0, stop, self.block), self.blocks, strict=False)
            if first + self.block > start
        ]

    def attend(
        self, q: Float[Tensor, "r h 1 e"], k: Float[Tensor, "r h 1 e"], v: Float[Tensor, "r h 1 e"], position: int
    ) -> Float[Tensor, "r h 1 e"]:
        """Store a position's keys and values; its attention to the prompt and the image keys it may see."""
        groups, candidates, heads, head_dim = self.shape
        self.write(by_head(k, self.shape), by_head(v, self.shape), self.plan.slots[position])
        parts, q = self.read(self.plan.reads[position]), q.to(self.prompt.dtype)
        if self.alone and len(parts) == 1:
            keys, values = parts[0].unflatten(1, (-1, heads))
            return F.scaled_dot_product_attention(q, keys, values)
        together = (groups * heads, candidates, head_dim)  # candidates that share a prompt read it in one product
        queries = (by_head(q, self.shape) * head_dim**-0.5).unsqueeze(1)
        scores = [torch.bmm(queries, keys.transpose(1, 2)) for keys, _ in parts]
        if self.prompt.shape[2]:
            shared = torch.bmm(queries.view(together), self.prompt[0].transpose(1, 2))
            scores.append(shared.view(len(queries), 1, -1))
        weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([score.shape[-1] for score in scores], dim=-1)
        if self.prompt.shape[2]:
            out = torch.bmm(weights[-1].view(groups * heads, candidates, -1), self.prompt[1]).view(queries.shape)
        else:
            out = torch.zeros_like(queries)
        for weight, (_, values) in zip(weights, parts, strict=False):
            out.baddbmm_(weight, values)
        return out.view(groups, heads, candidates, head_dim).transpose(1, 2).reshape(q.shape)

    def bytes(self) -> int:
        """Memory held."""
        return sum(part.nbytes for part in (*self.blocks, self.prompt))


def by_head(x: Float[Tensor, "r h 1 e"], shape: tuple[int, int, int, int]) -> Float[Tensor, "rows e"]:
    """One position's queries, keys or values in the cache's order (g, h, c)."""
    groups, candidates, heads, head_dim = shape
    return x.view(groups, candidates, heads, head_dim).transpose(1, 2).reshape(-1, head_dim)


class RecordingView(StreamView):
    """A view of the first positions that remembers what later ones will ask for."""

    full: Float[Tensor, "2 g h s e"]
    shifted: dict[int, Float[Tensor, "g s half"]]

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """As in training; keeps the channels that move."""
        if self.sources is not None:
            self.shifted = {**getattr(self, "shifted", {}), sublayer: x[..., : 2 * (x.shape[-1] // 4)]}
        return super().shift(x, sublayer)

    def attend(
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b h q e"], v: Float[Tensor, "b h q e"], stable: bool
    ) -> Float[Tensor, "b h q e"]:
        """As in training; keeps keys and values."""
        self.full = torch.stack([k, v])
        return super().attend(q, k, v, stable)


class StepView:
    """One layer's view of one image position at a time.

    Args:
        recorded: the layer's view of what came before.
        plan: slots of its pattern.
        text_length: t.
        candidates: c.
        grid_size: token rows = columns.
        dtype: type of the cached keys and values.
    """

    def __init__(
        self,
        recorded: RecordingView,
        plan: Plan,
        text_length: int,
        candidates: int,
        grid_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.cache = LayerCache(plan, recorded.full.to(dtype), text_length, candidates)
        self.turns, self.text_length, self.grid_size = recorded.turns, text_length, grid_size
        self.position = recorded.full.shape[3] - text_length
        """Raster position that is read next."""
        self.above: dict[int, Tensor] = {}
        """Moving channels of the last row of tokens, a ring ``[grid_size + 1, r, 1, half]``; its last entry stays zero."""
        if recorded.sources is not None:
            for sublayer, moved in recorded.shifted.items():
                image = moved[:, text_length:].repeat_interleave(candidates, dim=0)
                ring = image.new_zeros(grid_size + 1, len(image), 1, image.shape[-1])
                for position in range(max(0, self.position - grid_size), self.position):
                    ring[position % grid_size, :, 0] = image[:, position]
                self.above[sublayer] = ring

    def shift(self, x: Float[Tensor, "r 1 d"], sublayer: int) -> Float[Tensor, "r 1 d"]:
        """The first quarter of the channels from the token above, the second from the left; zeros at the borders."""
        if not self.above:
            return x
        ring, column = self.above[sublayer], self.position % self.grid_size
        half = ring.shape[-1]
        left = column - 1 if column else self.grid_size
        shifted = torch.cat([ring[column, ..., : half // 2], ring[left, ..., half // 2 :], x[..., half:]], dim=-1)
        ring[column] = x[..., :half]
        return shifted

    def turn(self, x: Float[Tensor, "r 1 two h e"]) -> Float[Tensor, "r 1 two h e"]:
        """Rotated by the position's angles."""
        if self.turns is None:
            return x
        at = self.text_length + self.position
        return rotate(x, self.turns[:, at : at + 1])

    def attend(
        self, q: Float[Tensor, "r h 1 e"], k: Float[Tensor, "r h 1 e"], v: Float[Tensor, "r h 1 e"], stable: bool
    ) -> Float[Tensor, "r h 1 e"]:
        """Attention over the cache. ``stable`` guards fp16 scores, which sampling does not use: the result is the same."""
        return self.cache.attend(q, k, v, self.position).to(q.dtype)

    def bytes(self) -> int:
        """Memory held."""
        return self.cache.bytes() + sum(ring.nbytes for ring in self.above.values())
