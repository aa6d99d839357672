"""A step of all layers as one program of ``torch.compile``: where the calls cost more than the arithmetic.

The program changes nothing: it reads the caches, and gives back the new keys, values and shifted channels, which are
then stored. (A program that writes into its inputs is compiled into one that copies them.)

Axes: as in cache.py.
"""

import types
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dalle_pytorch.generation.cache import StepView
from dalle_pytorch.models.attention import rotate


class LayerInputs(NamedTuple):
    """What a layer's program reads."""

    blocks: Float[Tensor, "blocks 2 rows slots e"]
    """Keys and values of earlier image positions."""
    hidden: Bool[Tensor, "blocks 1 slots"]
    """Slots that are not to be seen: empty, or about to be overwritten."""
    prompt: Float[Tensor, "2 gh t e"]
    above: list[Float[Tensor, "r 1 quarter"]]
    """Channels of the token above, for attention and feed-forward; none where the model does not shift."""
    left: list[Float[Tensor, "r 1 quarter"]]
    """The same for the token on the left."""


class FusedView:
    """One layer's view inside the program."""

    def __init__(self, inputs: LayerInputs, turns: Tensor | None, shape: tuple[int, int, int, int]) -> None:
        self.inputs, self.turns, self.shape = inputs, turns, shape
        self.moved: list[tuple[Tensor, Tensor]] = []
        self.keys = self.values = torch.empty(0)

    def shift(self, x: Float[Tensor, "r 1 d"], sublayer: int) -> Float[Tensor, "r 1 d"]:
        """As in StepView."""
        if not self.inputs.above:
            return x
        quarter = x.shape[-1] // 4
        self.moved.append((x[..., :quarter], x[..., quarter : 2 * quarter]))
        return torch.cat([self.inputs.above[sublayer], self.inputs.left[sublayer], x[..., 2 * quarter :]], dim=-1)

    def turn(self, x: Float[Tensor, "r 1 parts h e"]) -> Float[Tensor, "r 1 parts h e"]:
        """Rotated by the position's angles."""
        return x if self.turns is None else rotate(x, self.turns)

    def attend(
        self, q: Float[Tensor, "r h 1 e"], k: Float[Tensor, "r h 1 e"], v: Float[Tensor, "r h 1 e"], stable: bool
    ) -> Float[Tensor, "r h 1 e"]:
        """Attention to the prompt, the cache and the position itself."""
        groups, candidates, heads, head_dim = self.shape
        (blocks, hidden, prompt, _, _), rows = self.inputs, groups * candidates * heads
        queries, self.keys, self.values = (
            x.view(groups, candidates, heads, head_dim).transpose(1, 2).reshape(rows, head_dim) for x in (q, k, v)
        )
        queries = queries * head_dim**-0.5
        together = (groups * heads, candidates, head_dim)
        keys, values = blocks[:, 0].float(), blocks[:, 1].float()
        image = (keys * queries[:, None]).sum(dim=-1).masked_fill(hidden, -torch.inf)
        shared = torch.bmm(queries.view(together), prompt[0].float().transpose(1, 2)).view(rows, -1)
        own = (queries * self.keys).sum(dim=-1)
        top = torch.maximum(torch.maximum(image.amax(dim=2).amax(dim=0), shared.amax(dim=-1)), own)
        image, shared, own = (image - top[:, None]).exp(), (shared - top[:, None]).exp(), (own - top).exp()
        out = (image[..., None] * values).sum(dim=2).sum(dim=0)  # twice as fast as over both at once
        from_prompt = torch.bmm(shared.view(groups * heads, candidates, -1), prompt[1].float())
        out = out + from_prompt.view(rows, head_dim) + own[:, None] * self.values
        out = out / (image.sum(dim=2).sum(dim=0) + shared.sum(dim=-1) + own)[:, None]
        return out.view(groups, heads, candidates, head_dim).transpose(1, 2).reshape(q.shape)


class FusedStep:
    """All layers and the head as one program.

    Args:
        transformer: the blocks, prepared with ``packed=False``.
        head: scores the codebook.
    """

    def __init__(self, transformer: nn.Module, head: nn.Module) -> None:
        self.transformer, self.head = transformer, head
        # nothing replaces the layers of this private copy, so they are not checked anew at every step; a code object of
        # its own keeps its programs apart from those of other models, since torch finds programs by code object
        made = FusedStep.program
        own = types.FunctionType(
            made.__code__.replace(), made.__globals__, made.__name__, made.__defaults__, made.__closure__
        )
        unguarded: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        self.compiled = torch.compile(types.MethodType(own, self), options=unguarded)

    def program(
        self,
        inputs: Float[Tensor, "r 1 d"],
        layers: list[LayerInputs],
        turns: Float[Tensor, "2 1 e"] | None,
        shape: tuple[int, int, int, int],
        extra: dict[str, Any],
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[list[tuple[Tensor, Tensor]]]]:
        """Scores; and of each layer the keys, the values and the channels that move."""
        views = [FusedView(layer, turns, shape) for layer in layers]
        scores = self.head(self.transformer(inputs, views=views, **extra)[:, 0])
        return scores, [view.keys for view in views], [view.values for view in views], [view.moved for view in views]

    def __call__(
        self, inputs: Float[Tensor, "r 1 d"], views: list[StepView], turns: Float[Tensor, "2 s e"] | None, **extra: Any
    ) -> Float[Tensor, "r k"]:
        """Read a position; the views' caches are extended. ``extra`` goes to the layers as it is."""
        first = views[0]
        at = first.text_length + first.position
        here = None if turns is None else turns[:, at : at + 1]
        layers = [layer_inputs(view) for view in views]
        scores, keys, values, moved = self.compiled(inputs, layers, here, first.cache.shape, extra)
        for view, k, v, shifted in zip(views, keys, values, moved, strict=True):
            view.cache.write(k, v, view.cache.plan.slots[view.position])
            column = view.position % view.grid_size
            for sublayer, (above, left) in enumerate(shifted):
                view.above[sublayer][column], view.left[sublayer] = above, left
        return scores


def layer_inputs(view: StepView) -> LayerInputs:
    """The part of a layer's cache that its next position sees."""
    cache, plan = view.cache, view.cache.plan
    slot, read, device = plan.slots[view.position], plan.reads[view.position], cache.blocks.device
    if plan.runs and isinstance(read, slice):
        # two blocks at least: their number is a variable of the program, and one would be a constant
        count = min(max(-(-read.stop // cache.block), 2), len(cache.blocks))
        blocks, index = cache.blocks[:count], torch.arange(count * cache.block, device=device).view(count, 1, -1)
        hidden = (index >= read.stop) | (index == slot)
        if count > 1:
            torch._dynamo.mark_dynamic(blocks, 0)
            torch._dynamo.mark_dynamic(hidden, 0)
    else:
        read = torch.arange(read.start, read.stop, device=device) if isinstance(read, slice) else read
        padded = F.pad(read, (0, plan.most - len(read)))
        blocks = cache.blocks.index_select(3, padded)
        hidden = ((torch.arange(plan.most, device=device) >= len(read)) | (padded == slot)).view(1, 1, -1)
    column = view.position % view.grid_size
    above = [ring[column] for ring in view.above]
    left = view.left if column else view.zeros
    return LayerInputs(blocks, hidden, cache.prompt, above, left)
