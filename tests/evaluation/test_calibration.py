"""Calibration of a logit scale in closed form."""

import math

import pytest
import torch

from dalle_pytorch.evaluation.calibration import best_scale, calibration_error, choice_nats


def test_the_best_scale_says_how_often_it_is_right():
    """Two candidates 0.2 apart, three of four right: sigmoid(0.2 s) = 3 / 4, so s = ln(3) / 0.2."""
    scores, right = torch.tensor([[0.5, 0.3]]).repeat(4, 1), torch.tensor([0, 0, 0, 1])
    scale = best_scale(scores, right)
    assert scale == pytest.approx(math.log(3) / 0.2, rel=1e-4)
    probability = (scale * scores).softmax(dim=1)[:, 0]
    assert probability.tolist() == pytest.approx([0.75] * 4, rel=1e-4)
    assert calibration_error(probability, right == 0) == pytest.approx(0, abs=1e-4)
    assert best_scale(scores, torch.zeros(4, dtype=torch.long)) > 150  # never wrong: as sure as can be
    assert best_scale(scores, torch.ones(4, dtype=torch.long)) == pytest.approx(0.1, rel=1e-3)  # always


def test_no_other_scale_is_better(generator):
    scores, right = torch.rand(30, 8, generator=generator), torch.randint(8, (30,), generator=generator)
    scores[torch.arange(30), right] += 0.2
    scale = best_scale(scores, right)
    least = choice_nats(scores, right, scale).mean()
    assert all(least <= choice_nats(scores, right, factor * scale).mean() for factor in (0.5, 0.9, 1.1, 2))
    assert choice_nats(scores, right, 0).tolist() == pytest.approx([math.log(8)] * 30)


def test_calibration_error_by_hand():
    """Bins of a fifth: 0.9 twice, one right: 0.4 off; 0.5 once, right: 0.5 off; (2 * 0.4 + 0.5) / 3."""
    confidences, right = torch.tensor([0.9, 0.9, 0.5]), torch.tensor([True, False, True])
    assert calibration_error(confidences, right, bins=5) == pytest.approx((2 * 0.4 + 0.5) / 3, rel=1e-6)
    assert calibration_error(confidences, right, bins=1) == pytest.approx((2.3 - 2) / 3, rel=1e-6)
    low = torch.tensor([0.1, 0.3])  # in bins of their own
    assert calibration_error(low, torch.tensor([False, True]), bins=5) == pytest.approx((0.1 + 0.7) / 2, rel=1e-6)
    assert calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


def test_what_does_not_fit_is_refused():
    scores = torch.rand(3, 2)
    with pytest.raises(ValueError, match="3 queries given"):
        choice_nats(scores, torch.zeros(2, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="scores: 1 of 3"):
        choice_nats(scores.index_fill(0, torch.tensor([1]), math.nan), torch.zeros(3, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="fit together"):
        calibration_error(torch.ones(3), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="not \\[0, 1\\]"):
        calibration_error(torch.tensor([1.5]), torch.ones(1, dtype=torch.bool))
