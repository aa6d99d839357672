"""A step with fewer launches: as a program of ``torch.compile``, or as a CUDA graph.

Axes: as in cache.py; d width.
"""

import types
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dalle_pytorch.generation.cache import CachedView, ShiftRead, State, Step, shifted
from dalle_pytorch.models.attention import rotate

ACTIVE: ContextVar[Sequence[CachedView]] = ContextVar("active")
"""Views of the step that a compiled program is running."""


class CompiledView:
    """A layer's view inside a compiled program: attention, and with it the cache, is a call that is not looked into.

    A program that wrote to the caches itself would be compiled into one that copies them, and would be another one for
    every length that is read.
    """

    def __init__(
        self,
        layer: int,
        turns: Float[Tensor, "2 q e"] | None,
        near: Sequence[Float[Tensor, "r two_q quarter"]],
        shift: ShiftRead | None,
    ) -> None:
        self.layer, self.turns, self.near, self.shift_read = layer, turns, near, shift
        self.moving: list[Tensor] = []

    def shift(self, x: Float[Tensor, "r q d"], sublayer: int) -> Float[Tensor, "r q d"]:
        """As in CachedView."""
        if self.shift_read is None:
            return x
        self.moving.append(x[..., : 2 * self.near[sublayer].shape[-1]])
        return shifted(x, self.near[sublayer], self.shift_read)

    def turn(self, x: Float[Tensor, "r q heads e"]) -> Float[Tensor, "r q heads e"]:
        """As in CachedView."""
        return x if self.turns is None else rotate(x, self.turns)

    def attend(
        self, q: Float[Tensor, "r h q e"], k: Float[Tensor, "r g q e"], v: Float[Tensor, "r g q e"], stable: bool
    ) -> Float[Tensor, "r h q e"]:
        """As in CachedView."""
        new = (part.float().contiguous() for part in (q, k, v))  # as KernelCache asks for
        return torch.ops.dalle_pytorch.attend(*new, self.layer).to(q.dtype)


_OPERATORS = torch.library.Library("dalle_pytorch", "FRAGMENT")
_OPERATORS.define("attend(Tensor q, Tensor k, Tensor v, int layer) -> Tensor")
_OPERATORS.impl(
    "attend",
    lambda q, k, v, layer: ACTIVE.get()[layer].attend(q, k, v, False).contiguous(),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "dalle_pytorch::attend", lambda q, k, v, layer: torch.empty_like(q).contiguous(), lib=_OPERATORS
)


class CompiledTrunk:
    """The blocks of a model as one program; called as they are.

    torch finds programs by code object: one of its own keeps this model's programs apart from those of others. Nothing
    replaces the layers of this private copy, so they are not checked anew at every step.

    Args:
        trunk: the blocks, laid out for sampling.
    """

    def __init__(self, trunk: nn.Module) -> None:
        def program(
            x: Tensor,
            turns: Tensor | None,
            near: list[Sequence[Tensor]],
            shift: ShiftRead | None,
            context: dict[str, Any],
        ) -> tuple[Tensor, list[list[Tensor]]]:
            views = [CompiledView(layer, turns, own, shift) for layer, own in enumerate(near)]
            return trunk(x, views=views, **context), [view.moving for view in views]

        own = types.FunctionType(
            program.__code__.replace(), program.__globals__, program.__name__, None, program.__closure__
        )
        # the checks of sizes between its kernels take 0.1 ms a step of 8 layers
        options: Any = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe, "size_asserts": False}
        self.program = torch.compile(own, options=options)

    def __call__(
        self, x: Float[Tensor, "r q d"], views: Sequence[CachedView], **context: Any
    ) -> Float[Tensor, "r q d"]:
        """Run the blocks over the positions that the views show."""
        token, step = ACTIVE.set(views), views[0].step
        try:
            out, moving = self.program(x, step.turns, [view.near for view in views], step.shift, context)
        finally:
            ACTIVE.reset(token)
        for view, parts in zip(views, moving, strict=True):
            view.moving += parts
        return out


class GraphedStep:
    """A step of one State as a CUDA graph, replayed with other tokens and positions: one launch in place of hundreds.

    The first step is run once outside the graph, as capturing asks for. The graph belongs to its State, whose caches it
    reads and writes, and keeps no reference to it.
    """

    def __init__(
        self, run: Callable[[State, Tensor, Step], Tensor], state: State, image_tokens: Int[Tensor, "r q"], first: int
    ) -> None:
        self.tokens = image_tokens.clone()
        self.step = tree_map_only(Tensor, Tensor.clone, state.step(first, image_tokens.shape[1], static=True))
        with torch.cuda.device(image_tokens.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run(state, self.tokens, self.step)
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # other threads may use the GPU meanwhile: those that load data, or a server's
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.scores = run(state, self.tokens, self.step)

    def __call__(self, state: State, image_tokens: Int[Tensor, "r q"], first: int) -> Float[Tensor, "r q k"]:
        """Scores, valid until the next call."""
        self.tokens.copy_(image_tokens)
        step = state.step(first, image_tokens.shape[1], static=True)
        for kept, new in zip(tree_leaves(self.step), tree_leaves(step), strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(new)
        self.graph.replay()
        return self.scores
