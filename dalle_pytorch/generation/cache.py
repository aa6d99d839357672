"""What sampling remembers: each layer's keys and values, and the tokens that token shift looks back at.

A prompt's keys are stored once and shared by all its candidates; a candidate keeps image keys only, and of those only
as many as its layer's pattern can still see. Everything is allocated once. Which slot a position writes and which it
reads is worked out from the pattern's mask beforehand, so a step builds no mask.

Axes: g groups (a prompt, or its null twin for guidance), c candidates of a group, r = g * c rows, h heads, e head_dim,
t text positions with <bos>, n image tokens, m slots of the image cache, d width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from dalle_pytorch.models.attention import StreamView

BLOCK = 32
"""Image slots that lie side by side for all rows: what one step reads is then a few long runs of memory. With all slots
of a row side by side attention of 256 candidates took twice as long until the picture's last quarter, and as long at
its end (benchmarks/sampling.py)."""


class Plan(NamedTuple):
    """Where a layer keeps its image keys, and which of them each image position sees."""

    slots: list[int]
    """Slot that each raster position writes."""
    reads: list[slice | Int[Tensor, " visible"]]
    """Slots that each raster position sees, itself included."""
    room: int
    """Number of slots."""
    runs: bool
    """Every position sees the first so many slots."""
    most: int
    """Slots that a position sees at most."""

    def allocated(self) -> int:
        """Slots allocated for each of many candidates: runs come in whole blocks."""
        return -(-self.room // BLOCK) * BLOCK if self.runs else self.room


def plan(visible: Bool[Tensor, "n n"], pattern: str, device: torch.device | str = "cpu") -> Plan:
    """Slots of a pattern: a ring as long as it looks back, and for columns one run for each column.

    Args:
        visible: image part of ``pattern_mask``.
        pattern: its name.
        device: where the cache will be.
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
        first, last = int(read[0]), int(read[-1])
        reads.append(slice(first, last + 1) if last - first + 1 == len(read) else read.to(device))
    runs = all(isinstance(read, slice) and read.start == 0 for read in reads)
    return Plan(slots.tolist(), reads, room, runs, int(visible.sum(dim=1).max()))


class LayerCache:
    """Keys and values of one layer.

    Args:
        plan: slots of its pattern.
        full: keys and values of the prompt and the given image tokens, ``[2, g, h, t + given, e]``.
        text_length: t.
        candidates: c.
        dtype: of what is kept.
        in_front: let a lone candidate's image keys follow its prompt's in one run, which is read at once.
    """

    def __init__(
        self,
        plan: Plan,
        full: Float[Tensor, "2 g h s e"],
        text_length: int,
        candidates: int,
        *,
        dtype: torch.dtype,
        in_front: bool = True,
    ) -> None:
        _, groups, heads, length, head_dim = full.shape
        full = full.to(dtype)
        self.plan, self.shape = plan, (groups, candidates, heads, head_dim)
        self.text_length = text_length
        self.in_front = in_front and candidates == 1 and plan.runs
        self.offset = text_length if self.in_front else 0
        slots, rows = self.offset + plan.room, groups * candidates * heads
        self.block = BLOCK if plan.runs and not self.in_front else slots
        self.blocks = full.new_zeros(-(-slots // self.block), 2, rows, self.block, head_dim)
        """Image keys and values, rows in the order (g, h, c)."""
        self.halves = [tuple(block.unbind()) for block in self.blocks]
        self.prompt = full[:, :, :, :text_length].flatten(1, 2).contiguous()
        """Keys and values of the prompts, ``[2, g * h, t, e]``; empty where they lie in front."""
        if self.in_front:
            self.blocks[0, :, :, :text_length] = self.prompt
            self.prompt = self.prompt[:, :, :0].clone()
        given = full[:, :, :, text_length:].flatten(1, 2).repeat_interleave(candidates, dim=1)
        for position in range(max(0, length - text_length - plan.room), length - text_length):
            self.write(given[0, :, position], given[1, :, position], plan.slots[position])

    def write(self, k: Float[Tensor, "rows e"], v: Float[Tensor, "rows e"], slot: int) -> None:
        """Store one position's keys and values."""
        block, at = divmod(self.offset + slot, self.block)
        keys, values = self.halves[block]
        keys.select(1, at).copy_(k)
        values.select(1, at).copy_(v)

    def attend(
        self, q: Float[Tensor, "r h 1 e"], k: Float[Tensor, "r h 1 e"], v: Float[Tensor, "r h 1 e"], position: int
    ) -> Float[Tensor, "r h 1 e"]:
        """Store a position's keys and values; its attention to the prompt and the image keys it may see."""
        self.write(self.by_head(k), self.by_head(v), self.plan.slots[position])
        read = self.plan.reads[position]
        if self.in_front and isinstance(read, slice):
            some = self.offset + read.stop
            keys, values = (half.narrow(1, 0, some) for half in self.halves[0])
            queries = q.reshape(-1, 1, q.shape[-1]).to(keys.dtype)
            return attend_one(queries, keys, values).view(q.shape).to(q.dtype)
        groups, candidates, heads, head_dim = self.shape
        queries = self.by_head(q).to(self.blocks.dtype) * head_dim**-0.5
        out = mix_blocks(queries, self.prompt, *self.visible(read))
        return out.view(groups, heads, candidates, head_dim).transpose(1, 2).reshape(q.shape).to(q.dtype)

    def visible(self, read: slice | Tensor) -> tuple[Float[Tensor, "blocks 2 rows some e"], int]:
        """Blocks that hold the slots to read, and how many slots they are."""
        if not isinstance(read, slice):  # picked here and there: one copy
            return self.blocks.index_select(3, read), len(read)
        if self.plan.runs:
            return self.blocks[: -(-read.stop // self.block)], read.stop
        return self.blocks[:, :, :, read], read.stop - read.start

    def by_head(self, x: Float[Tensor, "r h 1 e"]) -> Float[Tensor, "rows e"]:
        """One position's queries, keys or values in the order (g, h, c)."""
        groups, candidates, heads, head_dim = self.shape
        if candidates == 1:
            return x.reshape(-1, head_dim)
        return x.view(groups, candidates, heads, head_dim).transpose(1, 2).reshape(-1, head_dim)

    def bytes(self) -> int:
        """Memory held."""
        return self.blocks.nbytes + self.prompt.nbytes


def attend_one(
    q: Float[Tensor, "rows 1 e"], k: Float[Tensor, "rows m e"], v: Float[Tensor, "rows m e"]
) -> Float[Tensor, "rows 1 e"]:
    """Attention of one query a row; on a CPU two products: torch's fused kernel is no faster (docs/sampling.md)."""
    if q.device.type == "cpu":
        return torch.bmm(torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).softmax(dim=-1), v)
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def mix_blocks(
    queries: Float[Tensor, "rows e"],
    prompt: Float[Tensor, "2 gh t e"],
    blocks: Float[Tensor, "blocks 2 rows some e"],
    seen: int,
) -> Float[Tensor, "rows e"]:
    """Attention of scaled queries to their prompt and to the first ``seen`` image slots.

    Candidates that share a prompt read its keys in one product.
    """
    size, queries = blocks.shape[3], queries.unsqueeze(1)
    parts = [block[:, :, : seen - first] for first, block in zip(range(0, seen, size), blocks.unbind(), strict=True)]
    scores = [torch.bmm(queries, keys.transpose(1, 2)) for keys, _ in parts]
    together = (prompt.shape[1], -1, prompt.shape[3])
    scores.append(torch.bmm(queries.view(together), prompt[0].transpose(1, 2)).view(len(queries), 1, -1))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).split([score.shape[-1] for score in scores], dim=-1)
    out = torch.bmm(weights[-1].view(prompt.shape[1], -1, prompt.shape[2]), prompt[1]).view(queries.shape)
    for weight, (_, values) in zip(weights, parts, strict=False):
        out.baddbmm_(weight, values)
    return out.squeeze(1)


class RecordingView(StreamView):
    """A view of the first positions that remembers what later ones will ask for."""

    full: Float[Tensor, "2 g h s e"]
    """Keys and values."""

    def __init__(self, view: StreamView) -> None:
        super().__init__(view.mask, view.layout, view.turns, view.shifts)
        self.shifted: list[Float[Tensor, "g s half"]] = []
        """Moving channels at the entry of attention and feed-forward; empty where the model does not shift."""

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """As in training; keeps the channels that move."""
        if self.shifts is not None:
            self.shifted.append(x[..., : 2 * (x.shape[-1] // 4)])
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
        cache: the layer's keys and values.
        phases: rotations of all positions, ``[s, 1, e / 2]``, or None.
        candidates: c.
        grid_size: token rows = columns.
    """

    def __init__(
        self,
        recorded: RecordingView,
        cache: LayerCache,
        phases: Complex[Tensor, "s 1 half"] | None,
        *,
        candidates: int,
        grid_size: int,
    ) -> None:
        self.cache, self.grid_size, self.text_length = cache, grid_size, cache.text_length
        self.phases = phases
        self.position = recorded.full.shape[3] - self.text_length
        """Raster position that is read next."""
        self.above: list[list[Tensor]] = []
        """For attention and feed-forward the first channel quarter of the last row of tokens, a ring by column."""
        self.left: list[Tensor] = []
        """The second quarter of the last token."""
        self.zeros: list[Tensor] = []
        """What stands on the left of the first column."""
        for moved in recorded.shifted:
            image = moved[:, self.text_length :].repeat_interleave(candidates, dim=0)
            first, second = image.chunk(2, dim=-1)
            zeros, *ring = (first.new_zeros(len(image), 1, first.shape[-1]) for _ in range(1 + grid_size))
            for position in range(max(0, self.position - grid_size), self.position):
                ring[position % grid_size] = first[:, position : position + 1]
            self.above.append([as_part(part) for part in ring])
            self.left.append(as_part(second[:, -1:] if self.position else zeros))
            self.zeros.append(as_part(zeros))

    def shift(self, x: Float[Tensor, "r 1 d"], sublayer: int) -> Float[Tensor, "r 1 d"]:
        """The first quarter of the channels from the token above, the second from the left; zeros at the borders."""
        if not self.above:
            return x
        ring, column, quarter = self.above[sublayer], self.position % self.grid_size, x.shape[-1] // 4
        first, second, rest = x.split_with_sizes([quarter, quarter, x.shape[-1] - 2 * quarter], dim=-1)
        shifted = torch.cat([ring[column], self.left[sublayer] if column else self.zeros[sublayer], rest], dim=-1)
        ring[column], self.left[sublayer] = first, second
        return shifted

    def turn(self, x: Float[Tensor, "r 1 parts h e"]) -> Float[Tensor, "r 1 parts h e"]:
        """Rotated by the position's angles: one product of complex numbers in place of five operations."""
        if self.phases is None:
            return x
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.phases[self.text_length + self.position]).view(x.shape).to(x.dtype)

    def attend(
        self, q: Float[Tensor, "r h 1 e"], k: Float[Tensor, "r h 1 e"], v: Float[Tensor, "r h 1 e"], stable: bool
    ) -> Float[Tensor, "r h 1 e"]:
        """Attention over the cache. ``stable`` guards scores in fp16, which sampling does not use."""
        return self.cache.attend(q, k, v, self.position)

    def bytes(self) -> int:
        """Memory held; a kept quarter of a token keeps the whole token."""
        return self.cache.bytes() + sum(4 * part.nbytes for ring in self.above for part in ring)


def as_part(quarter: Float[Tensor, "r 1 quarter"]) -> Float[Tensor, "r 1 quarter"]:
    """A copy with the strides of a token's channels: to a compiled program other strides are another input."""
    return torch.cat([quarter] * 4, dim=-1)[..., : quarter.shape[-1]]
