"""The key/value cache of sampling, and a layer's view of new image positions through it.

A prompt's keys are stored once for all its candidates. A candidate stores image keys only, and of those only as many as
its layer's attention pattern can still see: ``pattern_mask`` says where each position is written and what it reads.
Everything is allocated once. All that changes from step to step lies in a few small tensors (``Step``), so a step can
read any number of new positions, and can be compiled or captured in a CUDA graph.

Axes: g groups (a prompt, or its null twin for guidance), c candidates of a group, r = g * c rows in that order, h
heads, e head_dim, t prompt positions, n image tokens, s slots of the image cache, q new positions, d width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.generation.backend import attend
from dalle_pytorch.models.attention import StreamView, rotate


class Slots:
    """Where the layers of one pattern keep their image keys, and which of them each image position sees.

    Most patterns look back a fixed number of positions, so their slots form a ring of that length. Columns need every
    position; they are stored column by column, so that what a position reads lies side by side.

    Args:
        visible: image part of ``pattern_mask``: which positions (columns) each position (rows) sees, itself included.
        pattern: its name.
        window: most positions that are read in one step; a ring is longer by what they would overwrite.
        device: where the cache is.
    """

    def __init__(
        self, visible: Bool[Tensor, "n n"], pattern: str, window: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        n, position = len(visible), torch.arange(len(visible))
        if pattern == "axial_col":
            grid_size = round(n**0.5)
            self.count, write = n, position % grid_size * grid_size + position // grid_size
        else:
            lookback = int((position - visible.int().argmax(dim=1)).max())
            self.count = min(lookback + window, n)
            write = position % self.count
        query, key = visible.nonzero().unbind(dim=1)
        seen = torch.zeros(n, self.count, dtype=torch.bool)
        seen[query, write[key]] = True
        self.starts = seen.int().argmax(dim=1).tolist()
        self.stops = (self.count - seen.flip(1).int().argmax(dim=1)).tolist()
        spans = [stop - start for start, stop in zip(self.starts, self.stops, strict=True)]
        self.gapless = [span == count for span, count in zip(spans, seen.sum(dim=1).tolist(), strict=True)]
        """Whether a position sees all slots from its first to its last."""
        self.from_first = not any(self.starts)
        """Whether every position's slots begin with the first one."""
        self.write = write.to(device)
        """Slot of each position."""
        self.hidden = ~seen.to(device)
        """True = the position (row) does not see the slot (column)."""


class Read(NamedTuple):
    """What one pattern's layers write and read in a step."""

    write: Int[Tensor, " q"]
    start: int
    stop: int
    bias: Float[Tensor, "q seen"] | None
    """Added to the scores of slots start to stop: 0 or -inf; None = all of them are visible."""


class ShiftRead(NamedTuple):
    """Slots of token shift that a step writes and reads."""

    write: Int[Tensor, " q"]
    above: Int[Tensor, " q"]
    left: Int[Tensor, " q"]


class Step(NamedTuple):
    """The positions of one step, as its layers need them."""

    positions: Int[Tensor, " q"]
    """In raster order."""
    turns: Float[Tensor, "2 q e"] | None
    """Their part of ``rotary_turns``."""
    shift: ShiftRead | None
    reads: dict[str, Read]
    """By pattern."""

    def clone(self) -> "Step":
        """A copy with tensors of its own."""
        copy = lambda tensor: None if tensor is None else tensor.clone()  # noqa: E731
        reads = {
            pattern: read._replace(write=read.write.clone(), bias=copy(read.bias))
            for pattern, read in self.reads.items()
        }
        shift = None if self.shift is None else ShiftRead(*(part.clone() for part in self.shift))
        return Step(self.positions.clone(), copy(self.turns), shift, reads)

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        found = [self.positions, self.turns, *(self.shift or ())]
        found += [part for read in self.reads.values() for part in (read.write, read.bias)]
        return [tensor for tensor in found if tensor is not None]


class ShiftSlots:
    """Ring of the last tokens that token shift looks back at: a row of the grid, and what a step may overwrite.

    Args:
        grid_size: token rows = columns.
        window: most positions that are read in one step.
        device: where the cache is.
    """

    def __init__(self, grid_size: int, window: int, device: torch.device | str) -> None:
        length, position = grid_size + window, torch.arange(grid_size**2)
        self.count = length + 1
        nothing = torch.tensor(length)  # the last slot stays zero: what stands beyond the borders
        self.write = (position % length).to(device)
        above, left = (position - grid_size) % length, (position - 1) % length
        self.above = torch.where(position < grid_size, nothing, above).to(device)
        self.left = torch.where(position % grid_size == 0, nothing, left).to(device)

    def at(self, some: slice) -> ShiftRead:
        """Of some positions."""
        return ShiftRead(self.write[some], self.above[some], self.left[some])


class LayerCache:
    """Keys and values of one layer, and the channels that token shift moves.

    Args:
        prompt: keys and values of the prompts and of the given image tokens behind them, ``[2, g, h, t + m, e]``.
        prompt_length: t.
        slots: where image keys go.
        candidates: c.
        dtype: of keys and values.
        in_front: keep the prompt in front of the image keys of its only candidate, so that one product reads both.
    """

    def __init__(
        self,
        prompt: Float[Tensor, "2 g h s e"],
        prompt_length: int,
        slots: Slots,
        candidates: int,
        *,
        dtype: torch.dtype,
        in_front: bool,
    ) -> None:
        prompt = prompt.to(dtype)
        image = prompt[:, :, :, prompt_length:].repeat_interleave(candidates, dim=1)
        prompt = prompt[:, :, :, :prompt_length]
        self.offset = prompt_length if in_front else 0
        _, rows, heads, given, head_dim = image.shape
        self.keys, self.values = image.new_zeros(2, rows, heads, self.offset + slots.count, head_dim)
        """``[r, h, offset + s, e]``."""
        self.prompt = None if in_front else prompt.contiguous()
        """Keys and values of the prompts, ``[2, g, h, t, e]``; None where they lie in front of the image's."""
        if in_front:
            self.keys[:, :, : self.offset], self.values[:, :, : self.offset] = prompt
        some = slice(max(0, given - slots.count), given)
        keys, values = image[:, :, :, some]
        self.write(keys, values, self.offset + slots.write[some])
        self.recent: list[Float[Tensor, "r slots half"]] = []
        """Moving channels of the last tokens, at the entry of attention and of the feed-forward."""

    def keep_recent(
        self, moving: list[Float[Tensor, "g s half"]], slots: ShiftSlots, prompt_length: int, candidates: int
    ) -> None:
        """Store what token shift needs of the given image tokens."""
        for part in moving:
            image = part[:, prompt_length:].repeat_interleave(candidates, dim=0)
            ring, given = image.new_zeros(len(image), slots.count, image.shape[-1]), image.shape[1]
            some = slice(max(0, given - slots.count + 1), given)
            self.recent.append(ring.index_copy_(1, slots.write[some], image[:, some]))

    def write(self, k: Float[Tensor, "r h q e"], v: Float[Tensor, "r h q e"], at: Int[Tensor, " q"]) -> None:
        """Store keys and values of some positions."""
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)

    def keep_rows(self, rows: int, groups: int) -> None:
        """Forget all but the first rows, those of the first groups."""
        self.keys, self.values = self.keys[:rows], self.values[:rows]
        self.prompt = None if self.prompt is None else self.prompt[:, :groups]
        self.recent = [part[:rows] for part in self.recent]

    def bytes(self) -> int:
        """Memory held."""
        prompt = 0 if self.prompt is None else self.prompt.nbytes
        return self.keys.nbytes + self.values.nbytes + prompt + sum(part.nbytes for part in self.recent)


class RecordingView(StreamView):
    """A view of the first positions that remembers what later ones will ask for."""

    full: Float[Tensor, "2 g h s e"]
    """Keys and values."""

    def __init__(self, view: StreamView) -> None:
        super().__init__(view.mask, view.layout, view.turns, view.shifts)
        self.moving: list[Float[Tensor, "g s half"]] = []
        """Moving channels at the entry of attention and of the feed-forward; empty where the model does not shift."""

    def shift(self, x: Float[Tensor, "b q d"], sublayer: int) -> Float[Tensor, "b q d"]:
        """As in training; keeps the channels that move."""
        if self.shifts is not None:
            self.moving.append(x[..., : 2 * (x.shape[-1] // 4)])
        return super().shift(x, sublayer)

    def attend(
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b h q e"], v: Float[Tensor, "b h q e"], stable: bool
    ) -> Float[Tensor, "b h q e"]:
        """As in training; keeps keys and values."""
        self.full = torch.stack([k, v])
        return super().attend(q, k, v, stable)


class CachedView:
    """One layer's view of the positions of a step, and through its cache of those before them."""

    def __init__(self, cache: LayerCache, step: Step, pattern: str) -> None:
        self.cache, self.step, self.read = cache, step, step.reads[pattern]

    def shift(self, x: Float[Tensor, "r q d"], sublayer: int) -> Float[Tensor, "r q d"]:
        """The first quarter of the channels from the token above, the second from the left; zeros at the borders."""
        if self.step.shift is None:
            return x
        (write, above, left), recent, quarter = self.step.shift, self.cache.recent[sublayer], x.shape[-1] // 4
        recent.index_copy_(1, write, x[..., : 2 * quarter])
        first = recent[..., :quarter].index_select(1, above)
        second = recent[..., quarter:].index_select(1, left)
        return torch.cat([first, second, x[..., 2 * quarter :]], dim=-1)

    def turn(self, x: Float[Tensor, "r q parts h e"]) -> Float[Tensor, "r q parts h e"]:
        """Rotated by the positions' angles."""
        return x if self.step.turns is None else rotate(x, self.step.turns)

    def attend(
        self, q: Float[Tensor, "r h q e"], k: Float[Tensor, "r h q e"], v: Float[Tensor, "r h q e"], stable: bool
    ) -> Float[Tensor, "r h q e"]:
        """Store the positions' keys and values, then attend. Scores are fp32 here, so ``stable`` changes nothing."""
        cache, (write, start, stop, bias) = self.cache, self.read
        cache.write(k.to(cache.keys.dtype), v.to(cache.values.dtype), write)
        keys, values = (part[:, :, start:stop] for part in (cache.keys, cache.values))
        return attend(q, keys, values, cache.prompt, bias).to(q.dtype)


class State:
    """What has been read: the caches of all layers, and what the network needs of the prompts beside them."""

    def __init__(
        self,
        layers: list[LayerCache],
        patterns: list[str],
        slots: dict[str, Slots],
        shifts: ShiftSlots | None,
        turns: Float[Tensor, "2 n e"] | None,
        context: dict[str, Any],
    ) -> None:
        self.layers, self.patterns, self.context = layers, patterns, context
        self.slots, self.shifts, self.turns = slots, shifts, turns
        self.graphs: dict[tuple[int, ...], Any] = {}
        """CUDA graphs of steps, by the shape of the tokens that they read."""
        self.offsets = {pattern: layer.offset for pattern, layer in zip(patterns, layers, strict=True)}

    def step(self, first: int, count: int, *, static: bool = False) -> Step:
        """The step that reads the image positions ``first`` to ``first + count - 1``.

        Args:
            first: raster position.
            count: q, at most the window.
            static: read all slots under a bias, so that every step has the same shapes.
        """
        some, reads = slice(first, first + count), {}
        for pattern, slots in self.slots.items():
            offset = self.offsets[pattern]
            start, stop = min(slots.starts[some]), max(slots.stops[some])
            bias = None
            if static:
                start, stop = 0, slots.count
            if static or count > 1 or not slots.gapless[first]:
                hidden = slots.hidden[some, start:stop]
                bias = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
                bias = F.pad(bias, (offset, 0))  # the prompt in front is visible
            start = start + offset if start else 0
            reads[pattern] = Read(slots.write[some] + offset, start, stop + offset, bias)
        positions = torch.arange(first, first + count, device=next(iter(reads.values())).write.device)
        turns = None if self.turns is None else self.turns[:, some]
        return Step(positions, turns, None if self.shifts is None else self.shifts.at(some), reads)

    def views(self, step: Step) -> list[CachedView]:
        """Every layer's view of a step."""
        return [CachedView(layer, step, name) for layer, name in zip(self.layers, self.patterns, strict=True)]

    def keep_rows(self, rows: int, groups: int) -> None:
        """Forget all but the first rows, those of the first groups."""
        for layer in self.layers:
            layer.keep_rows(rows, groups)
        self.context = {
            name: [part[:groups] for part in value] if isinstance(value, list) else value[:groups]
            for name, value in self.context.items()
        }

    def bytes(self) -> int:
        """Memory held."""
        return sum(layer.bytes() for layer in self.layers)
