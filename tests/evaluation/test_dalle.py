"""A DALLE's numbers: those of its loss, beside honest baselines; candidates judged in closed form."""

import math

import pytest
import torch

from dalle_pytorch.evaluation import dalle as module
from dalle_pytorch.evaluation import likelihood
from dalle_pytorch.evaluation.baselines import unigram_loss
from dalle_pytorch.evaluation.dalle import Draw, Pairs, draw, evaluate_drawn, evaluate_likelihood
from dalle_pytorch.evaluation.features import Extractor, clip_extractor
from dalle_pytorch.evaluation.likelihood import likelihoods, other_captions, unigram_text_nats
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.page import Gallery, Plot
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.text import BPETokenizer

MEASURE = Measure({"split": "val"}, rounds=50, halves=10)
PROMPTS = ["a red apple", "a blue car", "a green tree", "a cat"]


def some_pairs(count: int = 10) -> Pairs:
    text = torch.randint(1, 9, (count, 5))
    text[::3, 2:] = 0  # captions of several lengths
    return Pairs([f"caption {i}" for i in range(count)], text, torch.randint(12, (count, 16)))


@pytest.mark.parametrize("settings", [{}, {"bos": False}, {"text_len": 9}])
def test_likelihoods_add_up_to_the_loss(make_dalle, settings, monkeypatch):
    dalle, pairs = make_dalle(**settings), some_pairs()
    loss = dalle.loss(pairs.text_tokens, pairs.image_tokens)
    for together in (64, 3):
        monkeypatch.setattr(likelihood, "TOGETHER", together)
        own = likelihoods(dalle, pairs.text_tokens, pairs.image_tokens)
        assert own.image.sum().item() / 160 == pytest.approx(loss.image.item(), rel=1e-5)
        assert (own.text.sum() / own.text_tokens.sum()).item() == pytest.approx(loss.text.item(), rel=1e-5)


def test_likelihoods_of_the_encoder_decoder_add_up_to_its_loss(tiny_vae):
    config = DALLEBartConfig(
        dim=16, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=16, text_vocab_size=12, text_positions=7,
        image_vocab_size=12, bos_id=12, grid_size=4,
    )  # fmt: skip
    model, pairs = DALLEBart(config, tiny_vae).eval(), some_pairs()
    text = pairs.text_tokens + 2 * (pairs.text_tokens > 0)  # 1 and 2 are <pad> and </s>
    own = likelihoods(model, text, pairs.image_tokens)
    assert own.text is None
    # its loss also counts the head's row 12, which is no code
    logits = model.image_head(model.hidden(text, pairs.image_tokens))
    unused = (logits.logsumexp(dim=-1) - logits[..., :12].logsumexp(dim=-1)).mean().item()
    loss = model.loss(text, pairs.image_tokens).image.item()
    assert own.image.sum().item() / 160 == pytest.approx(loss - unused, rel=1e-5)
    metrics, _ = evaluate_likelihood(model, pairs._replace(text_tokens=torch.full((10, 5), 4)), pairs, MEASURE)
    assert "text_nats" not in metrics


def test_likelihood_metrics_are_those_of_the_baselines(make_dalle):
    dalle, pairs, train = make_dalle(), some_pairs(), some_pairs(20)
    metrics, sections = evaluate_likelihood(dalle, pairs, train, MEASURE)
    loss = dalle.loss(pairs.text_tokens, pairs.image_tokens)
    assert metrics["image_nats"].value == pytest.approx(loss.image.item(), rel=1e-5)
    assert metrics["text_nats"].value == pytest.approx(loss.text.item(), rel=1e-5)
    unigram = unigram_loss(train.image_tokens, pairs.image_tokens, 12)
    assert metrics["image_nats_unigram"].value == pytest.approx(unigram, rel=1e-6)
    shuffled = dalle.loss(pairs.text_tokens.roll(5, dims=0), pairs.image_tokens).image.item()
    assert metrics["image_nats_shuffled_captions"].value == pytest.approx(shuffled, rel=1e-5)
    assert metrics["gain_of_caption"].value == pytest.approx(shuffled - loss.image.item(), abs=1e-5)
    assert metrics["gain_over_unigram"].value == pytest.approx(unigram - loss.image.item(), abs=1e-5)
    bits = loss.image.item() * 16 / math.log(2) / 256
    assert metrics["image_bits_per_pixel"].value == pytest.approx(bits, rel=1e-5)
    assert metrics["text_nats"].interval[0] < metrics["text_nats"].value < metrics["text_nats"].interval[1]
    assert sections[0].rows[0][0] == "image tokens"


def test_text_is_set_beside_a_unigram_model_of_the_same_tokens(make_dalle):
    """Without <bos> the first token is given, which frequencies know nothing of."""
    pairs = some_pairs()
    for bos in (True, False):
        metrics, _ = evaluate_likelihood(make_dalle(bos=bos), pairs, pairs, MEASURE)
        assert "text_nats" in metrics
        assert ("text_nats_unigram" in metrics) == bos


def test_a_caption_without_words_gains_nothing(make_dalle):
    pairs = some_pairs()._replace(text_tokens=torch.zeros(10, 5, dtype=torch.long))
    metrics, _ = evaluate_likelihood(make_dalle(), pairs, pairs, MEASURE)
    assert metrics["gain_of_caption"].value == pytest.approx(0, abs=1e-6)


def test_unigram_of_text_by_hand():
    """Ids 1 1 2 and two ends in training, one more each of four: 3 of id 1, 2 of 2, 3 ends, 1 of 3, of 9."""
    nats, counts = unigram_text_nats([[1, 1], [2]], [[1, 3], [2, 2, 1]], 4, 3)
    assert nats.tolist() == pytest.approx([-math.log(3 / 9 * 1 / 9 * 3 / 9), -math.log(2 / 9 * 2 / 9 * 3 / 9)])
    assert counts.tolist() == [3, 3]  # the second fills the context: no end is predicted


def test_shuffling_gives_every_sample_another_caption():
    """Also where captions come again after half the set, and a plain shift would give each its own."""
    text = torch.randint(1, 9, (10, 5))
    assert torch.equal(other_captions(text), text.roll(5, dims=0))
    for ids in ([0, 1, 2, 0, 1, 2], [0, 1, 1, 1, 0, 2], [5, 5, 3], [0, 0, 1, 1], [2, 0, 1, 0, 2, 0, 1]):
        rows = torch.tensor(ids)[:, None].expand(-1, 4)
        others = other_captions(rows)
        assert torch.equal(others.sort(dim=0).values, rows.sort(dim=0).values)  # each is used as often
        if max(ids.count(i) for i in ids) <= len(ids) / 2:
            assert (others != rows).all()
    assert torch.equal(other_captions(text[:1].expand(4, -1)), text[:1].expand(4, -1))


def test_one_sample_cannot_be_shuffled(make_dalle):
    pairs = Pairs(["a"], torch.ones(1, 5, dtype=torch.long), torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(ValueError, match="at least two"):
        evaluate_likelihood(make_dalle(), pairs, pairs, MEASURE)


@pytest.fixture
def models(make_dalle, tiny_clip):
    """A DALLE and two CLIPs that read prompts."""
    tokenizer = BPETokenizer.train(PROMPTS, 300)
    dalle = make_dalle(text_vocab_size=tokenizer.vocab_size, text_len=12)
    config = {**vars(tiny_clip.config), "text_vocab_size": tokenizer.vocab_size, "text_len": 12}
    clips = [type(tiny_clip)(type(tiny_clip.config)(**config)).eval() for _ in range(2)]
    for model in (dalle, *clips):
        model.text_tokenizer = tokenizer
    return dalle, *clips


def test_candidates_are_those_of_the_generator(models):
    dalle, ranker, _ = models
    drawn = draw(dalle, PROMPTS[:2], num_candidates=3, seed=5, sampling=SamplingConfig(), ranker=ranker)
    expected = Generator(dalle, ranker).generate(PROMPTS[1], num_candidates=3, num_keep=3, seed=5)
    torch.testing.assert_close(drawn.images[1], expected[0].images)
    torch.testing.assert_close(drawn.ranks[1], expected[1].all_scores)
    assert draw(dalle, PROMPTS[:1], num_candidates=2, seed=5, sampling=SamplingConfig()).ranks is None


def test_drawn_pictures_are_judged_in_closed_form(models, monkeypatch):
    """Pictures whose feature is their first pixel's colour, captions that are colours."""
    texts = torch.eye(3)
    extractor = Extractor("clip", "colours", "00" * 32, models[1], lambda images: images[:, :, 0, 0])
    monkeypatch.setattr(module, "clip_extractor", lambda judge: extractor)
    monkeypatch.setattr(module, "caption_features", lambda judge, captions: texts[: len(captions)])
    # two prompts, four candidates of pure colour; prompt 0 wants red, prompt 1 green
    colours = torch.tensor([[0, 1, 2, 1], [1, 1, 0, 2]])
    images = torch.eye(3)[colours][..., None, None].expand(-1, -1, -1, 16, 16).contiguous()
    ranks = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.1, 0.2, 0.9, 0.8]])  # right for the first, wrong for the second
    own = torch.eye(3)[[0, 1]][..., None, None].expand(-1, -1, 16, 16).contiguous()
    drawn = Draw(["red", "green"], images, ranks)
    metrics, sections = evaluate_drawn(
        drawn, own, own, MEASURE,
        judge=models[1], captions=["red", "green", "blue"], how={"seed": 0, "prompts": 2, "candidates": 4},
    )  # fmt: skip
    assert metrics["clip_score"].value == pytest.approx(100 * (1 / 4 + 2 / 4) / 2)
    assert metrics["r_precision"].value == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert metrics["r_precision"].protocol == {
        "split": "val", "seed": 0, "prompts": 2, "candidates": 4, "distractors": 2
    }  # fmt: skip
    assert metrics["clip_score_real"].protocol == {"split": "val", "seed": 0, "prompts": 2}
    assert metrics["r_precision_real"].protocol == {"split": "val", "seed": 0, "prompts": 2, "distractors": 2}
    assert metrics["clip_score_real"].value == metrics["r_precision_real"].value * 100 == 100
    assert metrics["clip_score_best_of_1"].value == metrics["clip_score"].value
    assert metrics["clip_score_best_of_4"].value == pytest.approx(100 * (1 + 0) / 2)
    # best of 2: red wins 3 of 6 pairs; green wins only the pair of greens, 1 of 6
    assert metrics["r_precision_best_of_2"].value == pytest.approx((3 / 6 + 1 / 6) / 2)
    assert [type(section) for section in sections] == [Gallery, Plot, Plot]
    assert list(sections[1].x) == [1, 2, 4]


def test_drawn_pictures_against_real_ones(models):
    dalle, ranker, judge = models
    drawn = draw(dalle, PROMPTS, num_candidates=4, seed=0, sampling=SamplingConfig(), ranker=ranker)
    real = torch.rand(16, 3, 16, 16)
    found = [
        evaluate_drawn(
            drawn, real, real[:4], MEASURE,
            judge=judge, captions=PROMPTS, extractors=[clip_extractor(judge)], blurs=[0.0, 2.0],
            how={"num_candidates": 4},
        ).metrics
        for _ in "ab"
    ]  # fmt: skip
    assert found[0] == found[1]
    metrics = found[0]
    assert {"fid_clip", "kid_clip", "cmmd", "precision_clip", "recall_clip", "clip_score_best_of_4"} <= set(metrics)
    assert metrics["fid_clip"].count == 16
    assert metrics["fid_clip_blur_2"].value != metrics["fid_clip"].value
    assert "blur of 2 pixels" in metrics["fid_clip_blur_2"].extractor
    assert metrics["fid_clip"].protocol["num_candidates"] == 4
    assert metrics["fid_clip"].interval is None  # four prompts are too few for halves
    without = evaluate_drawn(drawn._replace(ranks=None), real, real[:4], MEASURE, judge=judge, captions=PROMPTS, how={})
    assert not [name for name in without.metrics if "best_of" in name]
