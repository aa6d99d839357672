"""The key/value cache of sampling, and a layer's view of new image positions through it.

A prompt's keys are stored once for all its candidates (a lone candidate has them in front of its own). A candidate
stores image keys only, and of those only as many as its layer's attention pattern can still see: ``pattern_mask`` says
where each position is written and what it reads. Everything is allocated once. All that changes from step to step lies
in a few small tensors (``Step``), so a step can read any number of new positions, and can be compiled or captured in a
CUDA graph.

Axes: g groups (a prompt, or its null twin for guidance), c candidates of a group, r = g * c rows in that order, h
heads, e head_dim, t prompt positions, n image tokens, s slots of the image cache, q new positions, d width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from dalle_pytorch.generation.backend import attend
from dalle_pytorch.models.attention import StreamView


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
    """Quarters of channels that token shift moves in a step: two of each position, side by side."""

    write: Int[Tensor, " two_q"]
    """Where the ring stores those of the new positions."""
    read: Int[Tensor, " two_q"]
    """Where it has those of the token above and of the token on the left."""
    inside: Bool[Tensor, " two_q"] | None
    """Which of these tokens are new themselves; None = none."""
    source: Int[Tensor, " two_q"] | None
    """Where they are among the new ones' quarters."""


class Step(NamedTuple):
    """The positions of one step, as its layers need them."""

    positions: Int[Tensor, " q"]
    """Raster positions."""
    targets: Int[Tensor, " q"]
    """Raster positions that they predict."""
    turns: Float[Tensor, "2 q e"] | None
    """Their part of ``rotary_turns``."""
    phases: Complex[Tensor, "q 1 half"] | None
    """The same as complex numbers."""
    shift: ShiftRead | None
    reads: dict[str, Read]
    """By pattern."""


class ShiftRing:
    """The last tokens that token shift looks back at, in all layers: a row of the grid, and what a step may overwrite.

    Args:
        moving: channels that move at each entry of attention and of the feed-forward, of what the prefill read.
        prompt_length: t.
        candidates: c.
        grid_size: token rows = columns.
        window: most positions that are read in one step.
    """

    def __init__(
        self,
        moving: list[Float[Tensor, "g s half"]],
        *,
        prompt_length: int,
        candidates: int,
        grid_size: int,
        window: int,
    ) -> None:
        self.length = grid_size + window  # and a slot that stays zero: beyond the borders
        image = torch.stack(moving)[:, :, prompt_length:].unflatten(-1, (2, -1))  # [m, g, given, 2, quarter]
        entries, groups, given, _, quarter = image.shape
        self.recent = image.new_zeros(entries, groups, self.length + 1, 2, quarter)
        """``[entries, r, 2 * slots, quarter]``."""
        some = torch.arange(max(0, given - self.length), given, device=image.device)
        self.recent.index_copy_(2, some % self.length, image[:, :, some])
        self.recent = self.recent.flatten(2, 3).repeat_interleave(candidates, dim=1)

        position, nothing = torch.arange(grid_size**2, device=image.device), self.length
        above = torch.where(position >= grid_size, position - grid_size, -1)
        left = torch.where(position % grid_size > 0, position - 1, -1)
        self.write = pairs(position % self.length, position % self.length)
        """Where quarters of each position go, and where those of its neighbours are: two a position."""
        self.read = pairs(*(torch.where(at >= 0, at % self.length, nothing) for at in (above, left)))
        self.source = pairs(above, left)
        """Quarters of the neighbours, counted from the first position on; negative = there is none."""

    def at(self, first: int, count: int) -> ShiftRead:
        """Of the image positions ``first`` to ``first + count - 1``."""
        some = slice(2 * first, 2 * (first + count))
        write, read, source = self.write[some], self.read[some], self.source[some]
        if count == 1:  # no neighbour of a lone position is new
            return ShiftRead(write, read, None, None)
        return ShiftRead(write, read, source >= 2 * first, (source - 2 * first).clamp_min(0))

    def neighbours(self, shift: ShiftRead) -> Float[Tensor, "entries r two_q quarter"]:
        """Channels that move to the new positions, those of new tokens left out."""
        return self.recent.index_select(2, shift.read)

    def keep(self, moving: list[Float[Tensor, "r q half"]], shift: ShiftRead) -> None:
        """Store the moving channels of the new positions."""
        new = torch.stack(moving).unflatten(-1, (2, -1)).flatten(2, 3)
        self.recent.index_copy_(2, shift.write, new)


def pairs(first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> Int[Tensor, " two_n"]:
    """Numbers of the first quarter of some tokens and of the second quarter of others, side by side."""
    return torch.stack([2 * first, 2 * second + 1], dim=1).flatten()


def shifted(
    x: Float[Tensor, "r q d"], near: Float[Tensor, "r two_q quarter"], shift: ShiftRead
) -> Float[Tensor, "r q d"]:
    """Inputs with the first quarter of their channels from the token above, the second from the token on the left.

    Args:
        x: inputs of new positions.
        near: these quarters, of tokens that are not new.
        shift: which are.
    """
    half = 2 * near.shape[-1]
    if shift.inside is not None and shift.source is not None:
        own = x[..., :half].reshape(near.shape)
        near = torch.where(shift.inside[:, None], own.index_select(1, shift.source), near)
    return torch.cat([near.reshape(*x.shape[:2], half), x[..., half:]], dim=-1)


@runtime_checkable
class KeyCache(Protocol):
    """Keys and values of one layer: ``LayerCache``, or a kernel's own."""

    offset: int
    """Where its first slot is."""

    def attend(
        self, q: Float[Tensor, "r h q e"], k: Float[Tensor, "r g n e"], v: Float[Tensor, "r g n e"], read: Read
    ) -> Float[Tensor, "r h q e"]:
        """Store the keys and values of n new positions, then attend to what these see.

        Where several heads of the model share keys, their queries of one position after the other's are q queries.
        """
        ...

    def keep_rows(self, rows: int, groups: int) -> None:
        """Read no more than the first rows, those of the first groups."""

    def bytes(self) -> int:
        """Memory held."""
        ...


class LayerCache:
    """Keys and values of one layer.

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
        dtype: torch.dtype,
        *,
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

    def write(self, k: Float[Tensor, "r h q e"], v: Float[Tensor, "r h q e"], at: Int[Tensor, " q"]) -> None:
        """Store keys and values of some positions."""
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)

    def attend(
        self, q: Float[Tensor, "r h q e"], k: Float[Tensor, "r g n e"], v: Float[Tensor, "r g n e"], read: Read
    ) -> Float[Tensor, "r h q e"]:
        """As KeyCache says."""
        self.write(k.to(self.keys.dtype), v.to(self.values.dtype), read.write)
        keys, values = (part[:, :, read.start : read.stop] for part in (self.keys, self.values))
        return attend(q, keys, values, self.prompt, read.bias).to(q.dtype)

    def keep_rows(self, rows: int, groups: int) -> None:
        """As KeyCache says."""
        self.keys, self.values = self.keys[:rows], self.values[:rows]
        self.prompt = None if self.prompt is None else self.prompt[:, :groups]

    def bytes(self) -> int:
        """Memory held."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.prompt is None else self.prompt.nbytes)


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
        self, q: Float[Tensor, "b h q e"], k: Float[Tensor, "b g q e"], v: Float[Tensor, "b g q e"], stable: bool
    ) -> Float[Tensor, "b h q e"]:
        """As in training; keeps keys and values."""
        self.full = torch.stack([k, v])
        return super().attend(q, k, v, stable)


class CachedView:
    """One layer's view of the positions of a step, and through its cache of those before them.

    Args:
        cache: of the layer.
        step: the positions.
        pattern: the layer's.
        near: what ``ShiftRing.neighbours`` has for the layer's two sublayers; empty where the model does not shift.
    """

    def __init__(
        self, cache: KeyCache, step: Step, pattern: str, near: Sequence[Float[Tensor, "r two_q quarter"]]
    ) -> None:
        self.cache, self.step, self.read, self.near = cache, step, step.reads[pattern], near
        self.moving: list[Float[Tensor, "r q half"]] = []
        """Moving channels of the new positions."""

    def shift(self, x: Float[Tensor, "r q d"], sublayer: int) -> Float[Tensor, "r q d"]:
        """As ``shifted``, where the model shifts."""
        if self.step.shift is None:
            return x
        self.moving.append(x[..., : 2 * self.near[sublayer].shape[-1]])
        return shifted(x, self.near[sublayer], self.step.shift)

    def turn(self, x: Float[Tensor, "r q heads e"]) -> Float[Tensor, "r q heads e"]:
        """Rotated by the positions' angles: as ``rotate``, in one product of complex numbers in place of five steps."""
        if self.step.phases is None:
            return x
        pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.step.phases).view(x.shape).to(x.dtype)

    def attend(
        self, q: Float[Tensor, "r h q e"], k: Float[Tensor, "r g q e"], v: Float[Tensor, "r g q e"], stable: bool
    ) -> Float[Tensor, "r h q e"]:
        """As the cache does it. Scores are fp32 here, so ``stable`` changes nothing."""
        shared = q.shape[1] // k.shape[1]
        if shared == 1:
            return self.cache.attend(q, k, v, self.read)
        # heads that share keys are more positions of one head to the cache
        q = q.unflatten(1, (-1, shared)).flatten(2, 3)
        bias = None if self.read.bias is None else self.read.bias.repeat(shared, 1)
        out = self.cache.attend(q, k, v, self.read._replace(bias=bias))
        return out.unflatten(2, (shared, -1)).flatten(1, 2)


class State:
    """What has been read: the caches of all layers, and what the network needs of the prompts beside them."""

    def __init__(
        self,
        layers: Sequence[KeyCache],
        patterns: list[str],
        slots: dict[str, Slots],
        ring: ShiftRing | None,
        turns: Float[Tensor, "2 n e"] | None,
        order: Int[Tensor, " n"],
        context: dict[str, Any],
    ) -> None:
        self.layers, self.patterns, self.context = layers, patterns, context
        self.slots, self.ring, self.turns = slots, ring, turns
        self.phases: Complex[Tensor, "n 1 half"] | None = None
        if turns is not None:
            self.phases = torch.complex(turns[0, :, 0::2], turns[1, :, 1::2])[:, None]
        self.graphs: dict[tuple[int, ...], Any] = {}
        """CUDA graphs of steps, by the shape of the tokens that they read."""
        self.offsets = {pattern: layer.offset for pattern, layer in zip(patterns, layers, strict=True)}
        self.writes = {pattern: slots[pattern].write + offset for pattern, offset in self.offsets.items()}
        self.order = order
        self.targets = torch.cat([order[1:], order[-1:]])  # the last one predicts nothing

    def step(self, first: int, count: int, *, static: bool = False) -> Step:
        """The step that reads the image tokens ``first`` to ``first + count - 1`` of the order.

        Args:
            first: place in the order.
            count: q, at most the window.
            static: read all slots under a bias, so that every step has the same shapes.
        """
        some, reads = slice(first, first + count), {}
        for pattern, slots in self.slots.items():
            offset, bias = self.offsets[pattern], None
            start, stop = (0, slots.count) if static else (min(slots.starts[some]), max(slots.stops[some]))
            if static or count > 1 or not slots.gapless[first]:
                hidden = slots.hidden[some, start:stop]
                bias = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
                bias = F.pad(bias, (offset, 0))  # the prompt in front is visible
            start = start + offset if start else 0
            reads[pattern] = Read(self.writes[pattern][some], start, stop + offset, bias)
        turns = None if self.turns is None else self.turns[:, some]
        phases = None if self.phases is None else self.phases[some]
        shift = None if self.ring is None else self.ring.at(first, count)
        return Step(self.order[some], self.targets[some], turns, phases, shift, reads)

    def views(self, step: Step) -> list[CachedView]:
        """Every layer's view of a step."""
        near: list[Sequence[Tensor]] = [()] * len(self.layers)
        if self.ring is not None and step.shift is not None:
            every = self.ring.neighbours(step.shift).unbind()
            near = [every[entry : entry + 2] for entry in range(0, len(every), 2)]
        each = zip(self.layers, self.patterns, near, strict=True)
        return [CachedView(layer, step, pattern, own) for layer, pattern, own in each]

    def keep(self, views: list[CachedView], step: Step) -> None:
        """Store what token shift needs of the step that the views have seen."""
        if self.ring is not None and step.shift is not None:
            self.ring.keep([part for view in views for part in view.moving], step.shift)

    def keep_rows(self, rows: int, groups: int) -> None:
        """Read no more than the first rows, those of the first groups; the memory stays with the State."""
        for layer in self.layers:
            layer.keep_rows(rows, groups)
        if self.ring is not None:
            self.ring.recent = self.ring.recent[:, :rows]
        self.context = {
            name: [part[:groups] for part in value] if isinstance(value, list) else value[:groups]
            for name, value in self.context.items()
        }

    def bytes(self) -> int:
        """Memory held."""
        return sum(layer.bytes() for layer in self.layers) + (0 if self.ring is None else self.ring.recent.nbytes)
