"""Completion and cancelling."""

import gc
import weakref

import pytest
import torch

from dalle_pytorch.generation import strategies
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


@pytest.mark.parametrize("draft_tokens", [2, 3, 8, 16])
@pytest.mark.parametrize("name", ["none", "odd start", "middle"])
@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 2.0, "cfg_interval": [0.2, 0.6]}, {"temperature": 0.0}])
@pytest.mark.parametrize("prompts", [1, 2])
def test_speculation_draws_what_raster_draws(make_dalle, draft_tokens, name, settings, prompts):
    """Token for token, in no more steps; alone, and with two candidates of each of two prompts."""
    decoder = Decoder(make_dalle(attn_types=["full", "axial_row"], depth=2))
    given = KnownTokens(torch.randint(12, (prompts, 16)), MASKS[name])
    uniforms = torch.rand(prompts * prompts, 16)
    plain, steps = last(
        draw_image_tokens(
            decoder,
            TEXT[:prompts],
            uniforms,
            SamplingConfig(temperature=0.5) if not settings else SamplingConfig(**settings),
            given,
        )
    )
    ahead = SamplingConfig(**(settings or {"temperature": 0.5}), strategy="speculative", draft_tokens=draft_tokens)
    tokens, fewer = last(draw_image_tokens(decoder, TEXT[:prompts], uniforms, ahead, given))
    assert torch.equal(tokens, plain)
    assert len(fewer) <= len(steps)
    assert fewer == sorted(set(fewer))


def test_speculation_needs_few_steps_where_guesses_are_right(make_dalle):
    """A model that draws the same token everywhere guesses it: a step for each window but the first."""
    dalle = make_dalle(shift_tokens=False)
    with torch.no_grad():
        dalle.image_head.weight.zero_()
        dalle.image_head.bias.zero_()[7] = 100
    steps = last(
        draw_image_tokens(
            Decoder(dalle), TEXT, torch.rand(2, 16), SamplingConfig(strategy="speculative", draft_tokens=4)
        )
    )[1]
    assert len(steps) <= 8


def test_guidance_ends_with_its_interval(make_dalle, monkeypatch):
    """Behind it half of the rows are read, and the tokens are those of the same scales without the saving."""
    decoder, rows = Decoder(make_dalle(depth=2)), []
    uniforms = torch.rand(4, 16)
    read = decoder.read
    monkeypatch.setattr(
        decoder, "read", lambda state, tokens, first: rows.append(len(tokens)) or read(state, tokens, first)
    )
    saved, _ = last(draw_image_tokens(decoder, TEXT, uniforms, SamplingConfig(cfg_scale=3.0, cfg_interval=[0.0, 0.5])))
    assert rows == [8] * 7 + [4] * 8
    schedule = SamplingConfig(cfg_scale=3.0)
    monkeypatch.setattr(schedule, "scales", lambda count: [3.0] * 8 + [1 + 1e-9] * 8)
    assert torch.equal(last(draw_image_tokens(decoder, TEXT, uniforms, schedule))[0], saved)


def test_a_strategy_is_a_function_in_a_table(make_dalle, monkeypatch):
    def backwards(drawing):
        """Ignores the scores."""
        for position in range(drawing.last, drawing.first - 1, -1):
            drawing.tokens[:, position] = position % 12
            yield 0 if position else drawing.last + 1

    monkeypatch.setitem(strategies.STRATEGIES, "backwards", strategies.Strategy(backwards))
    tokens = generate_image_tokens(make_dalle(), TEXT, torch.rand(2, 16), SamplingConfig(strategy="backwards"))
    assert torch.equal(tokens, (torch.arange(16) % 12).expand(2, -1))


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
