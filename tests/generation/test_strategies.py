"""Completion and cancelling."""

import gc
import weakref

import pytest
import torch

from dalle_pytorch.generation.cache import State
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import KnownTokens, draw_image_tokens, generate_image_tokens

TEXT = torch.tensor([[3, 1, 4], [1, 5, 0]])
MASKS = {
    "rows": torch.arange(16) < 8,
    "odd start": torch.arange(16) < 5,
    "middle": (torch.arange(16) > 3) & (torch.arange(16) < 9),
    "scattered": torch.arange(16) % 3 == 0,
    "end": torch.arange(16) > 9,
    "all": torch.ones(16, dtype=torch.bool),
    "none": torch.zeros(16, dtype=torch.bool),
}


def last(events):
    """Tokens of the last event, and all counts."""
    counts = []
    for done, drawn in events:
        counts.append(done)
        tokens = drawn
    return tokens, counts


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", MASKS)
def test_completion_keeps_the_given_tokens(make_dalle, name, scale):
    """And draws the others as if the kept ones had been drawn themselves."""
    decoder, keep, sampling = Decoder(make_dalle()), MASKS[name], SamplingConfig(cfg_scale=scale)
    given, uniforms = KnownTokens(torch.randint(12, (2, 16)), keep), torch.rand(6, 16)
    copy = given.tokens.clone()
    tokens, counts = last(draw_image_tokens(decoder, TEXT, uniforms, sampling, given))
    assert torch.equal(tokens[:, keep], given.tokens.repeat_interleave(3, dim=0)[:, keep])
    assert torch.equal(given.tokens, copy)
    assert counts == sorted(set(counts))
    assert counts[-1] == 16
    for end in range(17):  # completing a finished start gives the same rest
        if keep[:end].all() and not keep[end:].any():
            again = generate_image_tokens(
                decoder,
                TEXT.repeat_interleave(3, dim=0),
                uniforms,
                sampling,
                given_tokens=tokens[:, :end],
            )
            assert torch.equal(again, tokens)


def test_what_lies_outside_the_mask_is_not_read(make_dalle):
    decoder, keep, uniforms = Decoder(make_dalle()), MASKS["scattered"], torch.rand(2, 16)
    first = torch.randint(12, (2, 16))
    second = torch.where(keep, first, 999)  # no token at all
    results = [
        last(draw_image_tokens(decoder, TEXT, uniforms, SamplingConfig(), KnownTokens(t, keep)))[0]
        for t in (first, second)
    ]
    assert torch.equal(*results)


def test_cancelling_frees_the_cache_and_keeps_the_tokens(make_dalle, monkeypatch):
    states = []
    start = Decoder.start

    def watched(self, *arguments, **options) -> tuple[State, torch.Tensor]:
        state, logits = start(self, *arguments, **options)
        states.append(weakref.ref(state))
        states.extend(weakref.ref(layer.keys) for layer in state.layers)
        return state, logits

    monkeypatch.setattr(Decoder, "start", watched)
    events = draw_image_tokens(Decoder(make_dalle()), TEXT, torch.rand(4, 16), SamplingConfig())
    for _ in range(7):
        done, tokens = next(events)
    assert done == 7
    assert all(reference() is not None for reference in states)
    events.close()
    gc.collect()
    assert all(reference() is None for reference in states)
    whole, _ = last(draw_image_tokens(Decoder(make_dalle()), TEXT, torch.rand(4, 16), SamplingConfig()))
    assert tokens.shape == whole.shape


def test_misfits_are_named(make_dalle):
    decoder = Decoder(make_dalle())
    with pytest.raises(ValueError, match=r"\(3, 16\).*multiple of 2"):
        next(draw_image_tokens(decoder, TEXT, torch.rand(3, 16), SamplingConfig()))
    for tokens, message in (
        (torch.zeros(1, 16), r"\(1, 16\).*2 prompts"),
        (torch.full((2, 16), 12), r"\[0, 12\].*0 to 11"),
    ):
        given = KnownTokens(tokens.long(), MASKS["rows"])
        with pytest.raises(ValueError, match=message):
            next(draw_image_tokens(decoder, TEXT, torch.rand(2, 16), SamplingConfig(), given))
