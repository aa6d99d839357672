"""The loop that draws image tokens, for any number of prompts with the same number of candidates each.

Axes: p prompts, c candidates of a prompt, r = p * c rows in that order, n image tokens, t text tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.bart import BartDecoder
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.sampling import SamplingConfig, guide
from dalle_pytorch.models.dalle import DALLE
from dalle_pytorch.models.dalle_bart import DALLEBart

AnyDALLE: TypeAlias = DALLE | DALLEBart
AnyDecoder: TypeAlias = Decoder | BartDecoder


class Given(NamedTuple):
    """Image tokens that stay as they are: the start of a picture, or any part of it.

    The model writes in raster order, so what is drawn fits the kept tokens above and to the left of it, and does not
    know those that come later.
    """

    tokens: Int[Tensor, "p n"]
    """Tokens of a picture for each prompt; what is not kept is not read."""
    keep: Bool[Tensor, " n"]
    """Which of them stay."""


def make_decoder(model: AnyDALLE, *, precision: str = "fp32", compiled: bool = False) -> AnyDecoder:
    """The decoder of a model; the arguments are those of ``Decoder``."""
    if isinstance(model, DALLEBart):
        return BartDecoder(model, precision=precision, compiled=compiled)
    return Decoder(model, precision=precision, compiled=compiled)


def draw_image_tokens(
    decoder: AnyDecoder,
    text_tokens: Int[Tensor, "p t"],
    uniforms: Float[Tensor, "r n"],
    sampling: SamplingConfig,
    given: Given | None = None,
    null_tokens: Int[Tensor, "p t"] | None = None,
) -> Iterator[tuple[int, Int[Tensor, "r n"]]]:
    """Draw, and after each position give their number and the tokens so far (always the same tensor).

    Closing the iterator early frees the cache; the tokens drawn until then stay valid.

    Args:
        decoder: the model, laid out for sampling.
        text_tokens: prompts, 0 = padding; each is read once, whatever the number of its candidates.
        uniforms: a number in [0, 1) for every row and position; position i decides image token i.
        sampling: temperature, truncation and guidance.
        given: tokens that stay as they are.
        null_tokens: what guidance leads away from; None = the empty caption.

    Raises:
        ValueError: shapes that do not fit; names them.
    """
    count, prompts = decoder.dalle.num_image_tokens, len(text_tokens)
    if uniforms.shape[1] != count or not prompts or len(uniforms) % prompts:
        raise UserError(
            f"uniforms of shape {tuple(uniforms.shape)} given, expected (candidates of {prompts} prompts, image "
            f"tokens) = (a multiple of {prompts}, {count})"
        )
    candidates, device = len(uniforms) // prompts, text_tokens.device
    tokens = torch.zeros(len(uniforms), count, dtype=torch.long, device=device)
    known = torch.zeros(count, dtype=torch.bool)
    if given is not None:
        if given.tokens.shape != (prompts, count) or given.keep.shape != (count,):
            raise UserError(
                f"given tokens of shape {tuple(given.tokens.shape)} and a mask of {tuple(given.keep.shape)} do not fit "
                f"{prompts} prompts of {count} image tokens"
            )
        known = given.keep.cpu()
        kept = torch.where(given.keep, given.tokens, 0).to(device)
        decoder.dalle.check_image_tokens(kept)
        tokens[:] = kept.repeat_interleave(candidates, dim=0)
    wanted = (~known).nonzero()[:, 0].tolist()
    if not wanted:
        yield count, tokens
        return

    start, scales, guided = wanted[0], sampling.scales(count), sampling.guided()
    prefix = tokens[::candidates, :start]
    if guided:  # the null twins of the prompts are the lower half of the rows
        null = torch.zeros_like(text_tokens) if null_tokens is None else null_tokens
        text_tokens, prefix = torch.cat([text_tokens, null]), torch.cat([prefix, prefix])
    state, logits = decoder.start(text_tokens, candidates, prefix)
    for position in range(start, wanted[-1] + 1):
        if position > start:
            last = tokens[:, position - 1]
            logits = decoder.step(state, torch.cat([last, last]) if guided else last)
        if not known[position]:
            if guided:
                cond, uncond = logits.chunk(2)
                logits = guide(cond, uncond, scales[position])
            tokens[:, position] = sampling.pick(logits, uniforms[:, position])
        yield (position + 1 if position < wanted[-1] else count), tokens


def generate_image_tokens(
    model: AnyDALLE | AnyDecoder,
    text_tokens: Int[Tensor, "p t"],
    uniforms: Float[Tensor, "r n"],
    sampling: SamplingConfig,
    *,
    given_tokens: Int[Tensor, "p given"] | None = None,
) -> Int[Tensor, "r n"]:
    """Sample the image tokens of captions; inputs and model are left as they were.

    Args:
        model: a DALLE or DALLEBart, or the decoder of one where several calls follow.
        text_tokens: captions, 0 = padding.
        uniforms: a number in [0, 1) for every row and position; rows that share a caption lie together.
        sampling: temperature, truncation and guidance.
        given_tokens: the first tokens of each caption's pictures, kept as they are.

    Raises:
        ValueError: shapes that do not fit; names them.
    """
    decoder = model if isinstance(model, Decoder | BartDecoder) else make_decoder(model)
    given = None
    if given_tokens is not None:
        decoder.dalle.check_image_tokens(given_tokens)
        count, some = decoder.dalle.num_image_tokens, given_tokens.shape[1]
        padded = torch.nn.functional.pad(given_tokens, (0, count - some))
        given = Given(padded, torch.arange(count, device=padded.device) < some)
    *_, (_, tokens) = draw_image_tokens(decoder, text_tokens, uniforms, sampling, given)
    return tokens
