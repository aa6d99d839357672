"""Candidates, guidance and ranking."""

import pytest
import torch
from torch.nn import functional as F

from dalle_pytorch import Generator, SamplingConfig
from dalle_pytorch.generation.generator import Candidates, Preview, Ranked
from dalle_pytorch.generation.rerank import rank, score
from dalle_pytorch.generation.strategies import KnownTokens, generate_image_tokens
from dalle_pytorch.text import BPETokenizer


@pytest.fixture
def tokenizer():
    return BPETokenizer.train(["a red apple", "a blue car"], 300)


@pytest.fixture
def prompted(make_dalle, tokenizer):
    """A small DALLE that reads prompts."""
    dalle = make_dalle(text_vocab_size=tokenizer.vocab_size, text_len=12, caption_dropout=0.1)
    dalle.text_tokenizer = tokenizer
    return dalle


SAMPLING = SamplingConfig(temperature=0.8, top_k=5, cfg_scale=2.0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_candidate_does_not_depend_on_the_others(prompted, batch_size):
    reference = Generator(prompted, batch_size=5).candidates("a red apple", range(5), seed=3, sampling=SAMPLING)
    generator = Generator(prompted, batch_size=batch_size)
    shuffled = generator.candidates("a red apple", [4, 2, 0], seed=3, sampling=SAMPLING)
    assert torch.equal(shuffled.image_tokens, reference.image_tokens[[4, 2, 0]])
    torch.testing.assert_close(shuffled.images, reference.images[[4, 2, 0]])
    assert len(reference.image_tokens.unique(dim=0)) == 5
    other = generator.candidates("a red apple", [4, 2, 0], seed=4, sampling=SAMPLING)
    assert not torch.equal(other.image_tokens, shuffled.image_tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_batch_size_changes_no_candidate_of_any_precision(prompted, precision):
    drawn = [
        Generator(prompted, batch_size=size, precision=precision).candidates("a red apple", range(8), sampling=SAMPLING)
        for size in (1, 3, 8)
    ]
    assert torch.equal(drawn[0].image_tokens, drawn[1].image_tokens)
    assert torch.equal(drawn[0].image_tokens, drawn[2].image_tokens)


@pytest.mark.parametrize("size", [2, 5, 7, 100])
@pytest.mark.parametrize("count", [1, 3])
def test_prompts_that_share_a_micro_batch_draw_what_they_draw_alone(prompted, size, count):
    """Token for token, whatever the micro-batch mixes; every candidate of every prompt comes once."""
    prompts = ["a red apple", "a blue car", "red", "a car", "a blue apple"]
    generator, drawn = Generator(prompted, batch_size=size), {}
    for number, event in generator.sample_each(prompts, range(count), seed=5, sampling=SAMPLING):
        for index, tokens in zip(event.indices, event.image_tokens, strict=True):
            assert (number, index) not in drawn
            drawn[number, index] = tokens
    for number, prompt in enumerate(prompts):
        alone = Generator(prompted, batch_size=1).candidates(prompt, range(count), seed=5, sampling=SAMPLING)
        for index, tokens in enumerate(alone.image_tokens):
            assert torch.equal(drawn.pop((number, index)), tokens)
    assert not drawn


@pytest.mark.parametrize("compiled", [False, True])
def test_every_prompt_keeps_its_own_given_tokens(prompted, monkeypatch, compiled):
    """Whatever micro-batch it comes in, also one that is filled up; one image's serve all prompts."""
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)
    prompts = ["a red apple", "a blue car", "red", "a car", "a blue apple"]
    generator = Generator(prompted, batch_size=4, compiled=compiled)
    for given in (torch.randint(12, (5, 16)), torch.randint(12, (1, 16))):
        known = KnownTokens(given, torch.arange(16) < 5)
        for number, event in generator.sample_each(prompts, range(2), given=known):
            assert event.image_tokens.shape == (2, 16)
            assert torch.equal(event.image_tokens[:, :5], given[number % len(given), None, :5].expand(2, -1))
    with pytest.raises(ValueError, match="given tokens of 3 images for 5 prompts"):
        next(generator.sample_each(prompts, range(2), given=KnownTokens(given.expand(3, -1), torch.arange(16) < 5)))


def test_compiled_micro_batches_have_one_shape(prompted, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)
    for prompts, count, size in ((5, 2, 4), (5, 2, 5), (1, 7, 3), (3, 7, 3), (2, 3, 100)):
        generator, shapes, drawn = Generator(prompted, batch_size=size, compiled=True), set(), []
        start = generator.decoder.start

        def watched(text, candidates, *rest, start=start, shapes=shapes, **more):
            shapes.add((len(text), candidates))
            return start(text, candidates, *rest, **more)

        monkeypatch.setattr(generator.decoder, "start", watched)
        for number, event in generator.sample_each([f"a car {n}" for n in range(prompts)], range(count)):
            drawn += [(number, index) for index in event.indices]
        assert sorted(drawn) == [(number, index) for number in range(prompts) for index in range(count)]
        assert len(shapes) == 1


def test_a_prompt_with_few_candidates_takes_its_memory(prompted):
    generator = Generator(prompted, memory_gb=1e-3)
    assert generator.micro_batch(SAMPLING, 1) < generator.micro_batch(SAMPLING, 50) <= generator.micro_batch(SAMPLING)


def test_many_prompts_with_a_candidate_each_fill_the_micro_batch(prompted, monkeypatch):
    generator, rows = Generator(prompted, batch_size=8), []
    start = generator.decoder.start
    monkeypatch.setattr(
        generator.decoder, "start", lambda text, *rest, **more: rows.append(len(text)) or start(text, *rest, **more)
    )
    ranked = dict(generator.stream_each(["a red apple"] * 20, [3], num_keep=1))
    assert rows == [8, 8, 4]
    assert len(ranked) == 20
    assert len(torch.cat([found.candidates.image_tokens for found in ranked.values()]).unique(dim=0)) == 1


def test_what_is_not_finite_is_never_drawn(prompted, tiny_clip):
    """NaN weights of the DALLE or of its image tokenizer; greedy and not."""
    with torch.no_grad():
        prompted.vae.decoder[-1].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="image tokenizer decodes to NaN"):
        Generator(prompted).candidates("a red apple", range(2))
    with torch.no_grad():
        prompted.transformer.blocks[0].ff_norm.weight[0] = torch.inf
    for settings in ({}, {"temperature": 0.0}, {"top_p": 0.5}, {"strategy": "speculative"}):
        with pytest.raises(ValueError, match="scores are NaN or infinite"):
            Generator(prompted).candidates("a red apple", [0], sampling=SamplingConfig(**settings))


@pytest.mark.usefixtures("unchecked_shapes")
def test_arguments_of_the_wrong_kind_are_named(prompted):
    generator = Generator(prompted)
    with pytest.raises(ValueError, match=r"a prompt must be a text, got \['a', 'b'\].*sample_each"):
        generator.generate(["a", "b"], num_candidates=1, num_keep=1)
    with pytest.raises(ValueError, match="seed must be an integer, got None"):
        generator.candidates("a red apple", [0], seed=None)
    with pytest.raises(ValueError, match="strategy must be one of raster, random, speculative, got 'halton'"):
        generator.candidates("a red apple", [0], sampling=SamplingConfig(strategy="halton"))


def test_memory_bounds_the_micro_batch(prompted):
    each = 2 * Generator(prompted).decoder.bytes_per_candidate()
    assert Generator(prompted, memory_gb=5.5 * each / 1e9).micro_batch(SAMPLING) == 5
    assert Generator(prompted, memory_gb=5.5 * each / 1e9).micro_batch(SamplingConfig()) == 11
    assert Generator(prompted, memory_gb=each / 1e10).micro_batch(SAMPLING) == 1
    assert Generator(prompted, memory_gb=1e3).micro_batch(SAMPLING) == 256
    assert Generator(prompted, batch_size=7).micro_batch(SAMPLING) == 7


def test_greedy_candidates_are_warned_against(prompted):
    with pytest.warns(UserWarning, match="all 3 candidates of a prompt equal"):
        drawn = Generator(prompted).candidates("a red apple", range(3), sampling=SamplingConfig(temperature=0.0))
    assert len(drawn.image_tokens.unique(dim=0)) == 1


def test_a_stream_previews_and_ranks_as_it_goes(prompted):
    """Tokens never change once shown, every micro-batch adds its candidates, the last ranking is generate's."""
    counted, generator = [], Generator(prompted, batch_size=2)
    events = list(
        generator.stream(
            "a red apple", range(5), num_keep=3, sampling=SAMPLING, preview_rows=2, progress=counted.append
        )
    )
    assert [type(event) for event in events] == [Preview, Ranked] * 3
    assert sum(counted) == 5 * 16
    assert [event.done for event in events[::2]] == [8, 8, 8]
    final = events[-1]
    for preview in events[::2]:
        rows = [final.candidates.indices.index(index) for index in preview.indices]
        assert torch.equal(preview.image_tokens[:, :8], final.candidates.image_tokens[rows, :8])
    assert [event.candidates.indices for event in events[1::2]] == [[0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert [len(event.ranking.indices) for event in events[1::2]] == [2, 3, 3]
    candidates, ranking = generator.generate("a red apple", num_candidates=5, num_keep=3, sampling=SAMPLING)
    assert torch.equal(candidates.image_tokens, final.candidates.image_tokens)
    assert torch.equal(ranking.indices, final.ranking.indices)


def test_a_stream_that_is_left_keeps_what_is_done(prompted):
    stream = Generator(prompted, batch_size=2).stream("a red apple", range(6), num_keep=4, sampling=SAMPLING)
    ranked = next(stream)
    stream.close()
    whole = Generator(prompted).candidates("a red apple", range(6), sampling=SAMPLING)
    assert torch.equal(ranked.candidates.image_tokens, whole.image_tokens[:2])


def test_completion_keeps_the_pictures_tokens(prompted):
    generator, image = Generator(prompted, batch_size=2), torch.rand(3, 16, 16)
    keep = torch.arange(16) % 4 < 2
    given = generator.given(image, keep)
    drawn = generator.candidates("a red apple", range(3), given=given, sampling=SAMPLING)
    assert torch.equal(drawn.image_tokens[:, keep], prompted.vae.encode(image[None])[:, keep].expand(3, -1))
    assert isinstance(given, KnownTokens)
    assert isinstance(drawn, Candidates)
    assert len(drawn.image_tokens.unique(dim=0)) == 3


def test_guidance_keeps_a_copied_prompt(make_dalle):
    """Image token i = text token i: as accurate at scale 3 as at 1 (in DALLE-pytorch, at chance)."""
    dalle = make_dalle(text_len=16, dim=64, depth=2, caption_dropout=0.1, shift_tokens=False, positions="both").train()
    optimizer = torch.optim.AdamW([p for p in dalle.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        text = torch.randint(1, 9, (16, 16))
        optimizer.zero_grad()
        F.cross_entropy(dalle(text, text, null_cond_prob=0.1).image.transpose(1, 2), text).backward()
        optimizer.step()
    dalle.eval()
    text, uniforms = torch.randint(1, 9, (64, 16)), torch.rand(64, 16)
    accuracy = {}
    for scale in (1.0, 3.0):
        before = text.clone()
        tokens = generate_image_tokens(dalle, text, uniforms, SamplingConfig(cfg_scale=scale))
        accuracy[scale] = (tokens == text).float().mean().item()
        assert torch.equal(text, before)
    assert accuracy[1.0] > 0.95, accuracy
    assert accuracy[3.0] >= accuracy[1.0] - 0.01, accuracy


def test_ranking_keeps_the_highest_cosines(tiny_clip, tokenizer):
    images = torch.rand(6, 3, 16, 16)
    tiny_clip.text_tokenizer = tokenizer
    tiny_clip.text_emb = torch.nn.Embedding(tokenizer.vocab_size, 16)
    tiny_clip.config.text_vocab_size = tokenizer.vocab_size
    ranking = rank(score(images, "red", [tiny_clip]), images, 4)
    expected = tiny_clip.scores(tokenizer.tokenize("red", 5), images)[0]
    torch.testing.assert_close(ranking.all_scores, expected)
    assert torch.equal(ranking.indices, expected.argsort(descending=True)[:4])
    assert torch.equal(ranking.scores, expected[ranking.indices])
    same = images[:1].expand(4, -1, -1, -1)
    ties = rank(score(same, "red", [tiny_clip]), same, 3)
    assert ties.indices.tolist() == [0, 1, 2]
    unranked = rank(score(images, "red", []), images, 2)
    assert unranked.indices.tolist() == [0, 1]
    assert unranked.scores is None


def test_misfits_are_named(prompted, make_dalle, tiny_clip):
    with pytest.raises(ValueError, match="no text tokenizer"):
        Generator(make_dalle())
    with pytest.raises(ValueError, match="no text tokenizer"):
        Generator(prompted, tiny_clip)
    generator = Generator(prompted)
    with pytest.raises(ValueError, match="a red apple"):
        generator.candidates("a red apple " * 9, range(1))
    prompted.config.caption_dropout = 0.0
    with pytest.raises(ValueError, match=r"cfg_scale=2.0.*caption_dropout=0"):
        generator.candidates("a red apple", range(1), sampling=SAMPLING)
    with pytest.raises(ValueError, match=r"num_keep \(3\).*num_candidates \(2\)"):
        generator.generate("a red apple", num_candidates=2, num_keep=3)
    with pytest.raises(ValueError, match="indices is empty"):
        generator.candidates("a red apple", [])
    assert list(generator.stream("a red apple", [], num_keep=1)) == []
    with pytest.raises(ValueError, match="memory_gb"):
        Generator(prompted, memory_gb=0.0)
    with pytest.raises(ValueError, match="batch_size"):
        Generator(prompted, batch_size=0)
    with pytest.raises(ValueError, match=r"\(1, 15\).*16\)"):
        generate_image_tokens(prompted, torch.ones(1, 2, dtype=torch.long), torch.rand(1, 15), SamplingConfig())
