"""Votes and diversity."""

import pytest
import torch

from dalle_pytorch.generation.rerank import rank, vote


def test_a_scorer_of_small_numbers_has_an_equal_vote():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.001, 0.003, 0.0025]])
    votes = vote(scores)
    torch.testing.assert_close(votes, vote(scores * torch.tensor([[1.0], [100.0]]) + 7), atol=1e-4, rtol=1e-4)
    assert votes.argmax() == 2  # second best for both, while each best is the other's worst
    torch.testing.assert_close(vote(scores[:1]), scores[0])
    assert vote(scores[:0]) is None


def test_a_scorer_that_cannot_decide_has_no_vote():
    ranking = rank(torch.tensor([[0.2, 0.1, 0.3], [0.5, 0.5, 0.5]]), torch.rand(3, 3, 4, 4), 3)
    assert ranking.indices.tolist() == [2, 0, 1]


def test_near_duplicates_are_passed_over_and_fill_up():
    """Pictures 0, 1 and 2 are alike, 3 and 4 are not; the best of the alike stays."""
    images = torch.zeros(5, 3, 4, 4)
    images[3], images[4] = 0.5, 1.0
    images[1] += 0.01
    scores = torch.tensor([[0.8, 0.9, 0.7, 0.1, 0.2]])
    kept = {k: rank(scores, images, k, min_distance=0.1).indices.tolist() for k in (1, 2, 3, 4, 5)}
    assert kept == {1: [1], 2: [1, 4], 3: [1, 4, 3], 4: [1, 4, 3, 0], 5: [1, 4, 3, 0, 2]}
    assert rank(scores, images, 3).indices.tolist() == [1, 0, 2]
    assert rank(scores[:0], images, 2, min_distance=0.1).indices.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("settings", "message"), [((0, 0.0), "num_keep"), ((4, 0.0), "num_keep"), ((1, 2.0), "min_distance")]
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        rank(torch.rand(1, 3), torch.rand(3, 3, 4, 4), settings[0], min_distance=settings[1])
