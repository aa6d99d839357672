"""A DALLEBart, one image token at a time: as decoder.py, with the prompt in cross-attention.

Axes: g groups (a prompt, or its null twin for guidance), c candidates of a group, r = g * c rows in that order, t text
tokens, p text positions, n image tokens, k codebook_size, h heads, e head_dim.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.generation.cache import LayerCache, RecordingView, StepView, plan
from dalle_pytorch.generation.decoder import State
from dalle_pytorch.generation.fused import FusedStep
from dalle_pytorch.generation.linear import keys_dtype, prepare, prepare_head
from dalle_pytorch.models.dalle_bart import DALLEBart
from dalle_pytorch.models.mode import eval_mode

TEXT_STEP = 16
"""Caption positions are read in multiples of it: captions of up to 14 tokens, with their two ends, are then alike."""


class BartState(State):
    """What has been read of pictures, and the prompts."""

    def __init__(
        self, views: list[StepView], keys: list[Float[Tensor, "2 g h p e"]], visible: Bool[Tensor, "g p"]
    ) -> None:
        super().__init__(views)
        self.keys, self.visible = keys, visible


class BartDecoder:
    """A DALLEBart laid out for sampling; the interface is that of ``decoder.Decoder``.

    Args:
        dalle: the model; not changed.
        precision: arithmetic of the decoder's linear layers (see ``linear.prepare``); the head as in ``Decoder``.
        compiled: translate a step with ``torch.compile``.
        consume: take the decoder's weights out of ``dalle`` as they are laid out: it can then do nothing but draw, and
            no weight is in memory twice.
        cache_dtype: of the keys and values; None = as ``linear.keys_dtype`` says: on a CPU fp32 unless compiled.

    Raises:
        ValueError: a precision that is unknown or that this device does not have.
    """

    def __init__(
        self,
        dalle: DALLEBart,
        *,
        precision: str = "fp32",
        compiled: bool = False,
        consume: bool = False,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.dalle, self.device = dalle, dalle.image_pos.weight.device
        self.network: Any = prepare(dalle.decoder, precision, packed=not compiled, consume=consume)
        self.head = prepare_head(dalle.image_head, precision, packed=not compiled, consume=consume)
        self.fused = FusedStep(self.network, self.head) if compiled else None
        self.cache_dtype = cache_dtype or keys_dtype(precision, self.device, compiled)
        count = dalle.num_image_tokens
        self.plan = plan(torch.ones(count, count, dtype=torch.bool).tril(), "full", self.device)

    def bytes_per_candidate(self, *, guided: bool = False) -> int:
        """What the caches of one candidate hold, prompts apart."""
        config = self.dalle.config
        keys = 2 * config.decoder_layers * self.plan.allocated() * config.dim * self.cache_dtype.itemsize
        return keys * (2 if guided else 1)

    @torch.inference_mode()
    def start(
        self,
        text_tokens: Int[Tensor, "g t"],
        candidates: int = 1,
        given_tokens: Int[Tensor, "g given"] | None = None,
    ) -> tuple[BartState, Float[Tensor, "r k"]]:
        """Read each prompt once, with the first image tokens where they are given: see ``Decoder.start``."""
        dalle = self.dalle
        padded = dalle.pad_text(text_tokens)
        with eval_mode(dalle):  # no dropout, though the model may be in training
            visible, memory = dalle.visible(padded), dalle.encode_text(padded)
            if self.fused is None:  # a compiled step is translated anew for every length
                # the padding that all share is not read; in steps, so that a prompt's sums seldom depend on others
                longest = -(-(int(visible.any(dim=0).nonzero().max()) + 1) // TEXT_STEP) * TEXT_STEP
                visible, memory = visible[:, :longest], memory[:, :longest]
            keys = self.network.keys(memory)
        x = dalle.embed_bos(len(padded))
        if given_tokens is not None and given_tokens.shape[1]:
            dalle.check_image_tokens(given_tokens)
            x = torch.cat([x, dalle.embed_image(given_tokens, 0)], dim=1)
        recorded = [RecordingView(view) for view in dalle.views()]
        out = self.network(x, captions=keys, visible=visible, views=recorded)
        steps = []
        for view in recorded:  # the token that begins a picture is all that candidates share
            cache = LayerCache(self.plan, view.full, 1, candidates, dtype=self.cache_dtype, in_front=self.fused is None)
            steps.append(StepView(view, cache, None, candidates=candidates, grid_size=dalle.grid_size))
        # shared by all candidates, so small; on a CPU torch's attention, which reads them, is slower in 16 bits
        kept = torch.float32 if self.device.type == "cpu" else self.cache_dtype
        keys = [layer.to(kept) for layer in keys]
        return BartState(steps, keys, visible), self.scores(self.head(out[:, -1])).repeat_interleave(candidates, dim=0)

    @torch.inference_mode()
    def step(self, state: State, image_tokens: Int[Tensor, " r"]) -> Float[Tensor, "r k"]:
        """Read the next image token of every row; scores of the one after it."""
        assert isinstance(state, BartState)  # start gave it
        inputs = self.dalle.embed_image(image_tokens[:, None], state.views[0].position)
        if self.fused is not None:
            scores = self.fused(inputs, state.views, None, captions=state.keys, visible=state.visible)
        else:
            out = self.network(inputs, captions=state.keys, visible=state.visible, views=state.views)
            scores = self.head(out[:, 0])
        for view in state.views:
            view.position += 1
        return self.scores(scores)

    def scores(self, out: Float[Tensor, "r rows"]) -> Float[Tensor, "r k"]:
        """Of the codebook only: the head has rows for tokens that no picture has."""
        return out[:, : self.dalle.codebook_size]
