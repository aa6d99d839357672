"""Retrieval by a table worked by hand; R-precision, CLIP score and best of N in closed form."""

import itertools
import math

import pytest
import torch

from dalle_pytorch.evaluation.retrieval import best_of_n, clip_score, r_precision, recall_at, retrieval_ranks

# text (row) to picture (column); partners on the diagonal
SCORES = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.3, 0.0, 0.1],  # first
        [0.5, 0.4, 0.3, 0.1, 0.0, 0.2],  # one is better: second
        [0.7, 0.6, 0.5, 0.8, 0.1, 0.9],  # four are better
        [0.1, 0.2, 0.3, 0.6, 0.6, 0.0],  # a tie counts against it: second
        [0.6, 0.5, 0.4, 0.3, 0.2, 0.8],  # all are better
        [0.0, 0.1, 0.2, 0.3, 0.1, 0.4],  # first
    ]
)
RIGHT = torch.eye(6, dtype=torch.bool)


def test_recall_both_ways_by_hand():
    ranks = retrieval_ranks(SCORES, RIGHT)
    assert ranks.tolist() == [0, 1, 4, 1, 5, 0]
    assert recall_at(ranks, 1, 6).mean().item() == pytest.approx(2 / 6)
    assert recall_at(ranks, 2, 6).mean().item() == pytest.approx(4 / 6)
    assert recall_at(ranks, 5, 6).mean().item() == pytest.approx(5 / 6)
    # picture to text: columns. 0.9 first; 0.4 after 0.6 0.5; 0.5 first; 0.6 after 0.8; 0.2 after 0.6; 0.4 after 0.9 0.8
    back = retrieval_ranks(SCORES.T, RIGHT)
    assert back.tolist() == [0, 2, 0, 1, 1, 2]
    assert recall_at(back, 1, 6).mean().item() == pytest.approx(2 / 6)


def test_any_of_several_right_answers_will_do():
    right = RIGHT.clone()
    right[1, 0] = right[2, 5] = True
    assert retrieval_ranks(SCORES, right).tolist() == [0, 0, 0, 1, 5, 0]


def test_a_model_that_scores_all_alike_finds_nothing():
    ranks = retrieval_ranks(torch.zeros(12, 12), torch.eye(12, dtype=torch.bool))
    assert [recall_at(ranks, k, 12).sum().item() for k in (1, 5, 10)] == [0, 0, 0]


def test_recall_that_says_nothing_is_refused():
    ranks = retrieval_ranks(SCORES, RIGHT)
    with pytest.raises(ValueError, match=r"R@10 of 6 candidates is always 1: .*more than 10 pairs"):
        recall_at(ranks, 10, 6)
    with pytest.raises(ValueError, match="k must"):
        recall_at(ranks, 0, 6)
    with pytest.raises(ValueError, match="query 0 has no right candidate"):
        retrieval_ranks(SCORES, torch.zeros_like(RIGHT))
    with pytest.raises(ValueError, match="shape"):
        retrieval_ranks(SCORES, RIGHT[:5])
    with pytest.raises(ValueError, match="scores: 1 of 6 samples are NaN"):
        retrieval_ranks(SCORES.clone().index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan)), RIGHT)


def test_r_precision_by_hand(generator):
    texts = torch.eye(5)
    images = torch.stack([texts[0], texts[1], 0.6 * texts[2] + 0.8 * texts[3], texts[4]])
    own = torch.tensor([0, 1, 2, 4])
    hits = r_precision(images, texts, own, generator, distractors=4)  # all others
    assert hits.tolist() == [1, 1, 0, 1]
    tie = r_precision(torch.ones(1, 5), texts, own[:1], generator, distractors=4)  # as near to every caption
    assert tie.tolist() == [0]


def test_r_precision_of_chance_is_one_in_all(generator):
    texts = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=1)
    images = torch.nn.functional.normalize(torch.randn(3000, 8, generator=generator), dim=1)
    own = torch.randint(30, (3000,), generator=generator)
    hits = r_precision(images, texts, own, generator, distractors=9)
    assert hits.mean().item() == pytest.approx(0.1, abs=0.02)
    equal = [r_precision(images[:9], texts, own[:9], torch.Generator().manual_seed(1), distractors=9) for _ in "ab"]
    assert torch.equal(*equal)


def test_r_precision_draws_every_other_caption_and_never_its_own(generator):
    """A picture like its own and every other caption but one: it misses as often as that one is drawn."""
    texts = torch.eye(4)
    image = torch.tensor([[0.5, 0.1, 0.1, 0.8]])
    hits = [r_precision(image, texts, torch.tensor([0]), generator, distractors=1).item() for _ in range(600)]
    assert sum(hits) / 600 == pytest.approx(2 / 3, abs=0.06)


def test_clip_score_in_closed_form():
    images, texts = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]]), torch.tensor([[1.0, 0], [1, 0], [1, 0]])
    assert clip_score(images, texts).tolist() == pytest.approx([100, 60, 0])


def test_pairs_that_do_not_fit_are_refused(generator):
    with pytest.raises(ValueError, match="one clip"):
        clip_score(torch.rand(2, 3), torch.rand(2, 4))
    with pytest.raises(ValueError, match="2 pictures given for 3 captions"):
        clip_score(torch.rand(2, 3), torch.rand(3, 3))
    with pytest.raises(ValueError, match="picture features: 1 of 2"):
        clip_score(torch.tensor([[1.0], [math.nan]]), torch.rand(2, 1))
    with pytest.raises(ValueError, match=r"distractors \(99\) must lie in 1 to .*\(4\); evaluate on more captions"):
        r_precision(torch.rand(2, 3), torch.rand(5, 3), torch.tensor([0, 1]), generator)


def test_best_of_n_is_the_mean_over_all_subsets(generator):
    ranker, judge = torch.rand(3, 6, generator=generator), torch.rand(3, 6, generator=generator)
    ranker[1, 2] = ranker[1, 4]  # the earlier one is kept
    sizes = list(range(1, 7))
    curve = best_of_n(ranker, judge, sizes)
    for prompt, size in itertools.product(range(3), sizes):
        chosen = [
            judge[prompt, max(subset, key=lambda i: (ranker[prompt, i].item(), -i))].item()
            for subset in itertools.combinations(range(6), size)
        ]
        assert curve[prompt, size - 1].item() == pytest.approx(sum(chosen) / len(chosen), rel=1e-6)


def test_best_of_n_rises_with_n_where_judge_and_ranker_agree(generator):
    scores = torch.rand(2, 256, generator=generator)
    curve = best_of_n(scores, scores, [1, 2, 4, 8, 16, 32, 64, 128, 256])
    assert (curve.diff(dim=1) > 0).all()
    torch.testing.assert_close(curve[:, -1], scores.amax(dim=1).double())
    torch.testing.assert_close(curve[:, 0], scores.double().mean(dim=1))


def test_best_of_n_refuses_what_was_not_drawn():
    scores = torch.rand(2, 4)
    with pytest.raises(ValueError, match=r"sizes \[1, 8\] must lie in 1 to .*\(4\)"):
        best_of_n(scores, scores, [1, 8])
    with pytest.raises(ValueError, match="differ"):
        best_of_n(scores, scores[:1], [1])
