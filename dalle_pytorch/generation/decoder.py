"""A text-to-image model laid out for sampling: reads prompts once, then new image tokens of every candidate.

Axes: g groups (a prompt, or its null twin for guidance), c candidates of a group, r = g * c rows in that order, t text
tokens, m given image tokens, n image tokens, q image tokens of a step, k codebook_size.
"""

import math
import sys
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.backend import keys_dtype, prepare, prepare_head
from dalle_pytorch.generation.cache import KeyCache, LayerCache, RecordingView, ShiftRing, Slots, State, Step
from dalle_pytorch.generation.kernel import TYPES, KernelCache, blocks_of, library
from dalle_pytorch.generation.programs import CompiledTrunk, GraphedStep
from dalle_pytorch.models.attention import reordered
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.text_to_image import TextToImage


class Decoder:
    """A model laid out for sampling. Some weights are copied: make another one after training on.

    Args:
        dalle: the model; not changed unless consumed.
        precision: arithmetic of the linear layers, "fp32", "bf16", "fp16" or "int8" (see ``backend.prepare``); that of
            the head as ``backend.prepare_head`` says.
        compiled: translate a step with ``torch.compile``: half a minute once for each number of candidates, then less
            time a step. On a CPU it needs a C++ compiler, and keys have another type (see ``backend.keys_dtype``).
        consume: take the weights of linear layers out of ``dalle`` as they are laid out: it can then do nothing but
            draw, and no weight is in memory twice.
        cache_dtype: of keys and values; None = as ``backend.keys_dtype`` says. int8 needs ``compiled`` on a CPU.

    Raises:
        ValueError: a precision that is unknown or that this device does not have.
    """

    def __init__(
        self,
        dalle: TextToImage,
        *,
        precision: str = "fp32",
        compiled: bool = False,
        consume: bool = False,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.dalle, self.compiled = dalle, compiled
        self.device = next(dalle.parameters()).device
        self.views = dalle.views()
        self.patterns = [dalle.pattern(layer) for layer in range(len(self.views))]
        self.trunk: Any = prepare(dalle.trunk, precision, consume=consume)
        self.head = prepare_head(dalle.image_head, precision, consume=consume)
        self.kernel = compiled and self.device.type == "cpu" and sys.platform != "win32"
        """Whether attention is the kernel of attention.cpp."""
        self.cache_dtype = cache_dtype or keys_dtype(precision, self.device, kernel=self.kernel)
        if not (self.cache_dtype.is_floating_point or (self.kernel and self.cache_dtype in TYPES)):
            raise UserError(f"keys of {self.cache_dtype} need compiled=True on a CPU, and are torch.int8 at that")
        if self.kernel:
            library(dalle.key_width // dalle.key_heads, self.cache_dtype)  # compiled, or refused, at once
        self.program = CompiledTrunk(self.trunk) if compiled else None
        self.graphs = self.device.type == "cuda" and not compiled
        """Whether a step is captured in a CUDA graph."""
        self._slots: dict[int, dict[str, Slots]] = {}

    def slots(self, window: int) -> dict[str, Slots]:
        """Cache slots of each pattern, for steps of at most ``window`` positions."""
        if window not in self._slots:
            t, n = self.dalle.prompt_length, self.dalle.num_image_tokens
            causal = torch.ones(n, n, dtype=torch.bool).tril()
            found = {}
            for pattern, view in zip(self.patterns, self.views, strict=True):
                if pattern not in found:
                    visible = causal if view.mask is None else view.mask[t:, t:].cpu()
                    found[pattern] = Slots(visible, pattern, window, self.device)
            self._slots[window] = found
        return self._slots[window]

    def bytes_per_candidate(self, *, window: int = 1) -> int:
        """What the caches of one candidate hold, prompts and twins apart, for steps of at most ``window`` positions."""
        slots, moving = self.slots(window), 0
        keys = sum(self._bytes(slots[pattern].count, self.cache_dtype) for pattern in self.patterns)
        if self.views[0].shifts is not None:  # a ring of a row and two: see ShiftRing
            moving = len(self.views) * 2 * (self.dalle.grid_size + window + 1) * (self.dalle.config.dim // 4 * 2) * 4
        return keys + moving

    def bytes_per_prompt(self) -> int:
        """What a prompt holds for all its candidates, and about what reading it takes: some eight widths a position."""
        length, config = self.dalle.prompt_length, self.dalle.config
        keys = len(self.views) * self._bytes(length, torch.float32 if self.kernel else self.cache_dtype)
        return keys + 8 * 4 * max(length, config.text_len) * config.dim

    def _bytes(self, positions: int, dtype: torch.dtype) -> int:
        """Of a layer's keys and values."""
        width, heads = self.dalle.key_width, self.dalle.key_heads
        if self.kernel:
            return heads * math.prod(blocks_of(positions, width // heads, dtype))
        return 2 * positions * width * dtype.itemsize

    @torch.inference_mode()
    def start(
        self,
        text_tokens: Int[Tensor, "g t"],
        candidates: int = 1,
        given_tokens: Int[Tensor, "g m"] | None = None,
        *,
        window: int = 1,
        order: Int[Tensor, " n"] | None = None,
    ) -> tuple[State, Float[Tensor, "r k"]]:
        """Read each prompt once, with the first image tokens where they are given.

        Args:
            text_tokens: prompts, 0 = padding.
            candidates: c, drawn for each prompt.
            given_tokens: first image tokens of the order, the same for all candidates of a prompt; fewer than n.
            window: most image tokens that a step will read.
            order: raster positions in the order in which they will be read; None = raster order.

        Returns:
            State, and scores of the next image token of every row.
        """
        dalle = self.dalle
        views = reordered(self.views, dalle.prompt_length, order)
        if order is None:
            order = torch.arange(dalle.num_image_tokens, device=self.device)
        recorded = [RecordingView(view) for view in views]
        with eval_mode(dalle):  # no dropout, though the model may be in training
            kept = torch.float32 if self.device.type == "cpu" else self.cache_dtype
            # a compiled step is translated anew for every length of a prompt
            x, context = dalle.read_prompt(text_tokens, self.trunk, order, dtype=kept, trim=not self.compiled)
            if given_tokens is not None and given_tokens.shape[1]:
                dalle.check_image_tokens(given_tokens)
                count = given_tokens.shape[1]
                x = torch.cat([x, dalle.embed_image(given_tokens, order[:count], order[1 : count + 1])], dim=1)
            out = self.trunk(x, views=recorded, **context)
        slots, t, layers = self.slots(window), dalle.prompt_length, list[KeyCache]()
        for pattern, view in zip(self.patterns, recorded, strict=True):
            arguments = (view.full, t, slots[pattern], candidates, self.cache_dtype)
            # 16-bit keys: one softmax over prompt and image rounds otherwise than two parts, so that a lone candidate
            # would differ from the same one in a micro-batch
            in_front = candidates == 1 and slots[pattern].from_first and self.cache_dtype == torch.float32
            layers.append(KernelCache(*arguments) if self.kernel else LayerCache(*arguments, in_front=in_front))
        ring = None
        if self.views[0].shifts is not None:
            moving = [part for view in recorded for part in view.moving]
            ring = ShiftRing(moving, prompt_length=t, candidates=candidates, grid_size=dalle.grid_size, window=window)
        turns = None if views[0].turns is None else views[0].turns[:, t:].float()
        state = State(layers, self.patterns, slots, ring, turns, order, context)
        return state, self.scores(out[:, -1]).repeat_interleave(candidates, dim=0)

    @torch.inference_mode()
    def read(self, state: State, image_tokens: Int[Tensor, "r q"], first: int) -> Float[Tensor, "r q k"]:
        """Read image tokens of every row; scores of the tokens that follow each of them in the order.

        Positions read before may be read again with other tokens: those that follow them are then forgotten.

        Args:
            state: what ``start`` gave.
            image_tokens: the tokens ``first`` to ``first + q - 1`` of the order; q is at most the window.
            first: all positions before it have been read.
        """
        if not self.graphs:
            return self.run(state, image_tokens, state.step(first, image_tokens.shape[1]))
        shape = tuple(image_tokens.shape)
        if shape not in state.graphs:
            state.graphs[shape] = GraphedStep(self.run, state, image_tokens, first)
        return state.graphs[shape](state, image_tokens, first)

    def run(self, state: State, image_tokens: Int[Tensor, "r q"], step: Step) -> Float[Tensor, "r q k"]:
        """One step through the network."""
        x, views = self.dalle.embed_image(image_tokens, step.positions, step.targets), state.views(step)
        trunk = self.trunk if self.program is None else self.program
        out = trunk(x, views=views, **state.context)
        state.keep(views, step)
        return self.scores(out)

    def scores(self, out: Float[Tensor, "*r d"]) -> Float[Tensor, "*r k"]:
        """Of the codebook only: a head may have rows for tokens that no image has."""
        return self.head(out)[..., : self.dalle.codebook_size]
