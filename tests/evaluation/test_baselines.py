"""Baselines in closed form, and a table that says which are beaten."""

import math

import pytest
import torch

from dalle_pytorch.evaluation.baselines import (
    Comparison,
    clip_comparisons,
    dalle_comparisons,
    psnr,
    ranking_comparison,
    table,
    tokenizer_comparison,
    unigram_loss,
)


def test_psnr_of_a_known_error():
    targets = torch.rand(3, 3, 8, 8) * 0.5
    assert psnr(targets + 0.1, targets) == pytest.approx(20, abs=1e-3)
    # of the mean error, not the mean of ratios: 20 dB and 40 dB give 22.97, not 30
    errors = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(targets[:2] + errors, targets[:2]) == pytest.approx(-10 * math.log10((0.01 + 0.0001) / 2), abs=1e-2)


def test_unigram_loss_is_the_cross_entropy_of_the_counts():
    train = torch.tensor([[0, 0, 1, 0]])  # with one more each: 4, 2, 1 of 7
    assert unigram_loss(train, torch.tensor([[0, 2, 0, 2]]), 3) == pytest.approx(
        -(math.log(4 / 7) + math.log(1 / 7)) / 2
    )


def test_dalle_against_unigram_and_shuffled_captions(make_dalle):
    """Without text, shuffled captions cost nothing more; the loss does not depend on how it is batched."""
    dalle = make_dalle()
    text, image = torch.randint(1, 9, (70, 5)), torch.randint(12, (70, 16))
    unigram, shuffled = dalle_comparisons(dalle, text, image, image)
    assert unigram.value == pytest.approx(dalle.loss(text, image).image.item(), rel=1e-5)
    assert unigram.baseline <= math.log(12) + 0.05
    other = dalle.loss(text.roll(35, dims=0), image).image.item()
    assert shuffled.baseline == pytest.approx(other, rel=1e-5)
    _, equal = dalle_comparisons(dalle, torch.zeros_like(text), image, image)
    assert equal.value == pytest.approx(equal.baseline, rel=1e-6)


def test_recall_counts_right_partners(tiny_clip, monkeypatch):
    features = torch.eye(8)[[0, 1, 2, 3]]
    monkeypatch.setattr(tiny_clip, "encode_text", lambda text: features)
    monkeypatch.setattr(tiny_clip, "encode_image", lambda images: features[[0, 1, 3, 2]])
    comparisons = clip_comparisons(tiny_clip, torch.ones(4, 5, dtype=torch.long), torch.rand(4, 3, 16, 16))
    assert [c.value for c in comparisons] == [50, 50]
    assert [c.baseline for c in comparisons] == [25, 25]
    assert all(c.beaten for c in comparisons)


def test_tokenizer_against_the_mean_picture(tiny_vae):
    images = torch.rand(5, 3, 16, 16)
    comparison = tokenizer_comparison(tiny_vae, images, torch.full((3, 16, 16), 0.5))
    assert comparison.value == pytest.approx(psnr(tiny_vae.decode(tiny_vae.encode(images)), images), rel=1e-5)
    assert comparison.baseline == pytest.approx(psnr(torch.full_like(images, 0.5), images), rel=1e-5)


def test_ranking_compares_kept_with_all():
    ranking = {"prompts": [{"all_scores": [0.1, 0.3, 0.2], "kept": [{"score": 0.3}]}]}
    comparison = ranking_comparison(ranking)
    assert (comparison.value, comparison.baseline) == pytest.approx((0.3, 0.2))
    ranking["prompts"][0]["all_scores"] = None
    with pytest.raises(ValueError, match="without a clip"):
        ranking_comparison(ranking)


def test_table_marks_what_is_not_beaten():
    lower = Comparison("loss", 2.0, "chance", 1.0, False, "nats", 3)
    higher = Comparison("psnr", 2.0, "mean", 1.0, True, "dB", 3)
    lines = table([lower, higher]).splitlines()
    assert lines[2].endswith("NOT BEATEN")
    assert lines[3].endswith(" beaten")
