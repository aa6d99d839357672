"""A DALLE, one image token at a time: reads prompts once, then a token of every candidate a step.

Axes: g groups (a prompt, or its null twin for guidance), c candidates of a group, r = g * c rows in that order, t text
tokens, n image tokens, k codebook_size.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.generation.cache import LayerCache, Plan, RecordingView, StepView, plan
from dalle_pytorch.generation.fused import FusedStep
from dalle_pytorch.generation.linear import keys_dtype, prepare, prepare_head
from dalle_pytorch.models.dalle import DALLE


class Decoder:
    """A DALLE laid out for sampling. Some weights are copied: make another one after training on.

    Args:
        dalle: the model; not changed.
        precision: arithmetic of the linear layers, "fp32", "bf16", "fp16" or "int8" (see ``linear.prepare``). The head
            that scores the codebook is as ``linear.prepare_head`` says, keys and values as ``linear.keys_dtype``.
        compiled: translate a step with ``torch.compile``: half a minute once for each number of candidates, then less
            time a step (needs a C++ compiler on a CPU).

    Raises:
        ValueError: a precision that is unknown or that this device does not have.
    """

    def __init__(self, dalle: DALLE, *, precision: str = "fp32", compiled: bool = False) -> None:
        self.dalle = dalle
        self.transformer = prepare(dalle.transformer, precision, packed=not compiled)
        self.head = prepare_head(dalle.image_head, precision, packed=not compiled)
        self.fused = FusedStep(self.transformer, self.head) if compiled else None
        self.device = dalle.image_emb.weight.device
        self.cache_dtype = keys_dtype(precision, self.device, compiled)
        self.turns = turns = dalle.rotary.float() if dalle.config.rotated else None
        self.phases = None if turns is None else torch.complex(turns[0, :, 0::2], turns[1, :, 1::2])[:, None]
        self.text_length = dalle.config.text_length
        self.plans: dict[str, Plan] = {}
        """Cache slots of each pattern."""
        for pattern, mask in zip(dalle.patterns, dalle.masks.cpu(), strict=True):
            self.plans[pattern] = plan(mask[self.text_length :, self.text_length :], pattern, self.device)

    def bytes_per_candidate(self, *, guided: bool = False) -> int:
        """What the caches of one candidate hold, prompts apart."""
        config = self.dalle.config
        slots = sum(self.plans[self.dalle.pattern(layer)].allocated() for layer in range(config.depth))
        keys = 2 * slots * config.heads * config.head_dim * self.cache_dtype.itemsize
        # a kept quarter keeps its whole token; attention and feed-forward each look back a row; 4 bytes a channel
        shifted = config.depth * 2 * self.dalle.grid_size * config.dim * 4 if config.shift_tokens else 0
        return (keys + shifted) * (2 if guided else 1)

    @torch.inference_mode()
    def start(
        self,
        text_tokens: Int[Tensor, "g t"],
        candidates: int = 1,
        given_tokens: Int[Tensor, "g given"] | None = None,
    ) -> tuple["State", Float[Tensor, "r k"]]:
        """Read each prompt once, with the first image tokens where they are given.

        Args:
            text_tokens: prompts, 0 = padding.
            candidates: c, drawn for each prompt.
            given_tokens: first image tokens, the same for all candidates of a prompt; fewer than n.

        Returns:
            State, and scores of the next image token of every row.
        """
        dalle = self.dalle
        if given_tokens is None:
            given_tokens = text_tokens.new_empty(len(text_tokens), 0)
        dalle.check_image_tokens(given_tokens)
        recorded = [RecordingView(view) for view in dalle.views()]
        out = self.transformer(dalle.embed(dalle.pad_text(text_tokens), given_tokens), recorded)
        steps = []
        for layer, view in enumerate(recorded):
            cache = LayerCache(
                self.plans[dalle.pattern(layer)],
                view.full,
                self.text_length,
                candidates,
                dtype=self.cache_dtype,
                in_front=self.fused is None,
            )
            steps.append(StepView(view, cache, self.phases, candidates=candidates, grid_size=dalle.grid_size))
        return State(steps), self.head(out[:, -1]).repeat_interleave(candidates, dim=0)

    @torch.inference_mode()
    def step(self, state: "State", image_tokens: Int[Tensor, " r"]) -> Float[Tensor, "r k"]:
        """Read the next image token of every row; scores of the one after it."""
        inputs = self.dalle.embed_image(image_tokens[:, None], state.views[0].position)
        if self.fused is not None:
            scores = self.fused(inputs, state.views, self.turns)
        else:
            scores = self.head(self.transformer(inputs, state.views)[:, 0])
        for view in state.views:
            view.position += 1
        return scores


class State:
    """What has been read: a view of each layer with its cache."""

    def __init__(self, views: list[StepView]) -> None:
        self.views = views

    def bytes(self) -> int:
        """Memory held."""
        return sum(view.bytes() for view in self.views)
