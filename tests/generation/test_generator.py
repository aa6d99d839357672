"""Candidates, guidance and ranking."""

import pytest
import torch
from torch.nn import functional as F

from dalle_pytorch import Generator, SamplingConfig
from dalle_pytorch.generation.generator import generate_image_tokens
from dalle_pytorch.generation.rerank import rerank
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


@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_sampling_with_a_cache_is_sampling_without(make_dalle, cfg_scale):
    """Token for token what drawing from the full forward pass gives."""
    dalle = make_dalle(attn_types=["axial_row", "conv_like"], conv_kernel=3)
    text, uniforms = torch.tensor([[3, 1, 0], [2, 0, 0]]), torch.rand(2, 16)
    tokens = generate_image_tokens(dalle, text, uniforms, SamplingConfig(cfg_scale=cfg_scale))
    expected = torch.empty(2, 0, dtype=torch.long)
    for position in range(16):
        cond = dalle.logits(text, expected).image[:, -1]
        uncond = dalle.logits(torch.zeros_like(text), expected).image[:, -1]
        probabilities = (uncond + cfg_scale * (cond - uncond)).double().softmax(-1).cumsum(-1)
        picked = (probabilities > uniforms[:, position, None]).int().argmax(dim=1)
        expected = torch.cat([expected, picked[:, None]], dim=1)
    assert torch.equal(tokens, expected)


def test_given_tokens_are_kept(make_dalle):
    dalle = make_dalle()
    given = torch.randint(12, (2, 7))
    tokens = generate_image_tokens(
        dalle, torch.ones(2, 3, dtype=torch.long), torch.rand(2, 16), SamplingConfig(cfg_scale=2.0), given_tokens=given
    )
    assert torch.equal(tokens[:, :7], given)


def test_guidance_keeps_a_copied_prompt(make_dalle):
    """Image token i = text token i: as accurate at scale 3 as at 1 (in DALLE-pytorch, at chance)."""
    dalle = make_dalle(text_len=16, dim=64, depth=2, caption_dropout=0.1, shift_tokens=False, positions="both").train()
    optimizer = torch.optim.AdamW([p for p in dalle.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(400):
        text = torch.randint(1, 9, (32, 16))
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
    ranking = rerank(images, "red", tiny_clip, 4)
    expected = tiny_clip.scores(tokenizer.tokenize("red", 5), images)[0]
    torch.testing.assert_close(ranking.all_scores, expected)
    assert torch.equal(ranking.indices, expected.argsort(descending=True)[:4])
    assert torch.equal(ranking.scores, expected[ranking.indices])
    ties = rerank(images[:1].expand(4, -1, -1, -1), "red", tiny_clip, 3)
    assert ties.indices.tolist() == [0, 1, 2]
    unranked = rerank(images, "red", None, 2)
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
    with pytest.raises(ValueError, match=r"\(1, 15\).*\(1, 16\)"):
        generate_image_tokens(prompted, torch.ones(1, 2, dtype=torch.long), torch.rand(1, 15), SamplingConfig())
