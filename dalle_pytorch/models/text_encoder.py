"""A text encoder that others have trained, frozen in front of a DALLE.

The network is one of transformers (T5, CLIP's text tower, BERT and its kin), which ``checkpoints/text_encoder.py``
makes and reads; here is what a DALLE asks of it.

Axes: b batch, t text tokens, s positions of the encoder, f features.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(kw_only=True)
class TextEncoderConfig:
    """Which network, and what it wants around a caption."""

    network: dict[str, Any] = field(default_factory=dict)
    """Its settings, the content of transformers' config.json."""
    width: int = 512
    """Features of a token."""
    max_tokens: int | None = None
    """Most positions that it has, marks included; None = any number."""
    start_id: int | None = None
    """Id that it wants in front of a caption ([CLS], <|startoftext|>); None = none (T5)."""
    end_id: int | None = None
    """Id that it wants behind it ([SEP], </s>)."""
    pad_id: int = 0
    """Id of what is not read."""
    token_shift: int = 0
    """How much higher the text tokenizer's ids are than the network's: 1 where its id 0 is no padding (text/hf.py)."""

    @property
    def marks(self) -> int:
        """Positions that the marks take."""
        return (self.start_id is not None) + (self.end_id is not None)


class TextFeatures(NamedTuple):
    """What an encoder says of captions."""

    values: Float[Tensor, "b t f"]
    present: Bool[Tensor, "b t"]
    """Where there are any: at a caption's tokens, and at the end mark if there is room for it. An empty caption has
    none."""


class TextEncoder(nn.Module):
    """Captions to the features of their tokens.

    Args:
        config: what the network wants around a caption.
        net: takes ``input_ids`` and ``attention_mask``, gives ``last_hidden_state``.
    """

    def __init__(self, config: TextEncoderConfig, net: nn.Module) -> None:
        super().__init__()
        self.config, self.net = config, net

    @torch.no_grad()
    def encode(self, text_tokens: Int[Tensor, "b t"]) -> TextFeatures:
        """Features in fp32 or what the weights have, whatever the arithmetic around.

        Args:
            text_tokens: ids of the text tokenizer, captions from the first position on, then 0.
        """
        config, marks = self.config, self.config.marks
        start = 0 if config.start_id is None else 1
        lengths, given = (text_tokens != 0).sum(dim=1, keepdim=True), text_tokens.shape[1]
        if text_tokens.device.type == "cpu":  # a GPU would have to be waited for
            text_tokens = text_tokens[:, : max(int(lengths.max()) + 1, 1)]
        at = torch.arange(text_tokens.shape[1] + marks, device=text_tokens.device)
        ids = F.pad(text_tokens - config.token_shift, (start, marks - start))
        if config.start_id is not None:
            ids[:, 0] = config.start_id
        if config.end_id is not None:
            ids = torch.where(at == start + lengths, config.end_id, ids)
        read = at < lengths + marks
        ids = torch.where(read, ids, config.pad_id)
        with torch.autocast(text_tokens.device.type, enabled=False):
            values = self.net(input_ids=ids, attention_mask=read.long()).last_hidden_state
        count = text_tokens.shape[1]
        ends = int(config.end_id is not None) * (lengths > 0)
        values = F.pad(values[:, start : start + count], (0, 0, 0, given - count))
        return TextFeatures(values, torch.arange(given, device=ids.device) < lengths + ends)
