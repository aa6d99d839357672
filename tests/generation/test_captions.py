"""From pictures to captions."""

import pytest
import torch
from torch.nn import functional as F

from dalle_pytorch import SamplingConfig, caption_picture, image_log_likelihood
from dalle_pytorch.generation.captions import draw_texts
from dalle_pytorch.text import BPETokenizer

NONE = torch.zeros(1, 0, dtype=torch.long)


@pytest.fixture
def copying(make_dalle):
    """A model of captions of one token, 1 to 8, each the picture of that token throughout."""
    dalle = make_dalle(text_len=4, dim=64, depth=2).train()
    optimizer = torch.optim.AdamW([p for p in dalle.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        text = torch.randint(1, 9, (32, 1))
        optimizer.zero_grad()
        dalle.loss(text, text.expand(-1, 16)).loss.backward()
        optimizer.step()
    return dalle.eval()


def test_the_likelihood_is_that_of_the_logits(make_dalle):
    dalle = make_dalle()
    text, image = torch.tensor([[3, 1, 4], [1, 5, 0]]), torch.randint(12, (2, 16))
    log_probs = dalle.logits(text, image).image.log_softmax(-1)
    expected = log_probs.gather(2, image[..., None]).sum(dim=(1, 2))
    torch.testing.assert_close(image_log_likelihood(dalle, text, image), expected)


def test_texts_follow_the_models_distribution(make_dalle):
    """First tokens of many captions: shares of the softmax over words and the pad that ends a caption at once."""
    dalle, count = make_dalle(), 4000
    uniforms = torch.rand(count, 5)
    uniforms[:, 0] = (torch.arange(count) + 0.5) / count
    texts = draw_texts(dalle, NONE.expand(count, 0), uniforms, SamplingConfig())
    scores = dalle.logits(NONE, NONE).text[0, 0]
    allowed = torch.cat([scores[9:10], scores[1:9]])  # the first position's pad, then the words
    torch.testing.assert_close(torch.bincount(texts[:, 0], minlength=9) / count, allowed.softmax(0), atol=1e-3, rtol=0)


def test_texts_keep_their_start_and_end_once(make_dalle):
    dalle, start = make_dalle(), torch.tensor([[7, 2]]).expand(200, -1)
    texts = draw_texts(dalle, start, torch.rand(200, 5), SamplingConfig(temperature=2.0))
    assert torch.equal(texts[:, :2], start)
    assert texts.max() < 9
    ended = (texts == 0).int()
    assert (ended.diff(dim=1) >= 0).all()
    assert ended[:, -1].any()
    assert not ended[:, -1].all()


def test_the_right_caption_makes_the_picture_likeliest(copying):
    words = torch.arange(1, 9)[:, None]
    for word in (2, 7):
        picture = torch.full((8, 16), word)
        assert image_log_likelihood(copying, words, picture).argmax() + 1 == word


def test_a_picture_gets_its_caption(copying, monkeypatch):
    tokenizer = BPETokenizer.train(["a"], 300)
    monkeypatch.setattr(tokenizer, "_encode", lambda text: [])
    monkeypatch.setattr(tokenizer, "_decode", lambda ids: " ".join(map(str, ids)))
    copying.text_tokenizer = tokenizer
    for word in (3, 5):
        monkeypatch.setattr(copying.vae, "encode", lambda image, word=word: torch.full((1, 16), word))
        captions = caption_picture(copying, torch.rand(3, 16, 16), num_candidates=64, num_keep=2)
        assert captions.text_tokens[0].tolist() == [word, 0, 0, 0]
        assert captions.log_likelihoods[0] > captions.log_likelihoods[1]


def test_compat_texts_are_drawn_with_a_prompt(make_dalle):
    tokenizer = BPETokenizer.train(["a red apple"], 300)
    dalle = make_dalle(text_vocab_size=tokenizer.vocab_size, text_len=12)
    source = torch.Generator().manual_seed(1)
    tokens, texts = dalle.generate_texts(tokenizer, "a red", generator=source)
    assert tokens.shape == (1, 12)
    assert tokens[0, : len(tokenizer.encode("a red"))].tolist() == tokenizer.encode("a red")
    assert texts[0].startswith("a red")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        dalle.generate_texts()


def test_compat_guided_logits_are_linear(make_dalle):
    dalle, text, image = make_dalle(), torch.tensor([[3, 1]]), torch.randint(12, (1, 16))
    cond, none = dalle(text, image).image, dalle(torch.zeros_like(text), image).image
    guided = dalle.forward_with_cond_scale(text, image, cond_scale=3.0).image
    torch.testing.assert_close(guided, none + 3 * (cond - none))
    assert F.mse_loss(guided, cond) > 0


def test_misfits_are_named(make_dalle):
    dalle = make_dalle()
    with pytest.raises(ValueError, match="guidance"):
        draw_texts(dalle, NONE, torch.rand(1, 5), SamplingConfig(cfg_scale=2.0))
    with pytest.raises(ValueError, match=r"5 text tokens.*text_len = 5"):
        draw_texts(dalle, torch.ones(1, 5, dtype=torch.long), torch.rand(1, 5), SamplingConfig())
    with pytest.raises(ValueError, match="1 to 8"):
        draw_texts(dalle, torch.tensor([[0, 3]]), torch.rand(1, 5), SamplingConfig())
    with pytest.raises(ValueError, match="no text tokenizer"):
        caption_picture(dalle, torch.rand(3, 16, 16))


def test_without_bos_a_caption_needs_its_first_word(make_dalle):
    """Then the next word is drawn from what the logits say after it."""
    dalle, count = make_dalle(bos=False), 4000
    with pytest.raises(ValueError, match="no <bos>"):
        draw_texts(dalle, NONE, torch.rand(1, 5), SamplingConfig())
    uniforms = torch.rand(count, 5)
    uniforms[:, 1] = (torch.arange(count) + 0.5) / count
    start = torch.tensor([[7]])
    texts = draw_texts(dalle, start.expand(count, -1), uniforms, SamplingConfig())
    scores = dalle.logits(start, NONE).text[0, 0]
    allowed = torch.cat([scores[10:11], scores[1:9]])  # the second position's pad, then the words
    torch.testing.assert_close(torch.bincount(texts[:, 1], minlength=9) / count, allowed.softmax(0), atol=1e-3, rtol=0)
