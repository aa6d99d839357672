"""Scorers, votes and diversity."""

import re
from pathlib import Path

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.compat.min_dalle_request import Request
from dalle_pytorch.generation.rerank import Scorer, as_scorers, rank, score, vote
from dalle_pytorch.models import two_towers
from dalle_pytorch.text import BPETokenizer

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


class Warm:
    """More red is better."""

    def score(self, images, prompt):
        return images[:, 0].mean(dim=(1, 2))


class Odd:
    """Gives what it is told to."""

    def __init__(self, scores) -> None:
        self.scores = scores

    def score(self, images, prompt):
        return self.scores


@pytest.fixture
def reading_clip(tiny_clip):
    """The CLIP with a text tokenizer."""
    tokenizer = BPETokenizer.train(["a red apple"], 300)
    config = type(tiny_clip.config)(**{**vars(tiny_clip.config), "text_vocab_size": tokenizer.vocab_size})
    clip = type(tiny_clip)(config)
    clip.text_tokenizer = tokenizer
    return clip


def test_a_scorer_of_a_user_ranks_alone_and_beside_a_clip(reading_clip):
    images = torch.rand(6, 3, 16, 16)
    warmth = images[:, 0].mean(dim=(1, 2))
    alone = rank(score(images, "red", as_scorers(Warm())), images, 3)
    assert torch.equal(alone.indices, warmth.argsort(descending=True)[:3])
    assert torch.equal(alone.all_scores, warmth)
    both = score(images, "red", as_scorers([reading_clip, Warm()]))
    assert torch.equal(both[1], warmth)
    torch.testing.assert_close(both[0], reading_clip.score(images, "red"))


def test_the_scorer_of_the_readme_ranks(make_dalle, reading_clip):
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def score(" in b]
    dalle = make_dalle(text_vocab_size=reading_clip.config.text_vocab_size, text_len=12)
    dalle.text_tokenizer = reading_clip.text_tokenizer
    names = {"dalle_pytorch": dalle_pytorch, "dalle": dalle, "clip": reading_clip}
    exec(block, names)
    assert isinstance(names["Warm"](), Scorer)
    candidates, ranking = names["generator"].generate("red", num_candidates=5, num_keep=5)
    rows = torch.stack([reading_clip.score(candidates.images, "red"), names["Warm"]().score(candidates.images, "red")])
    torch.testing.assert_close(ranking.all_scores, vote(rows))
    assert torch.equal(ranking.indices, ranking.all_scores.argsort(descending=True))


def test_the_score_of_a_clip_does_not_depend_on_micro_batches(reading_clip, monkeypatch):
    """Dropout is off, the mode is put back, and long prompts are cut to the context."""
    images, prompt = torch.rand(5, 3, 16, 16), "a red apple " * 20
    expected = reading_clip.eval().score(images, prompt)
    assert expected.shape == (5,)
    assert len(expected.unique()) == 5
    monkeypatch.setattr(two_towers, "SCORED_TOGETHER", 2)
    reading_clip.train()
    torch.testing.assert_close(reading_clip.score(images, prompt), expected)
    assert reading_clip.training
    assert not expected.requires_grad


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (object(), r"object cannot rank.*score\(images, prompt\).*protocol Scorer"),
        ([Warm(), "clip.safetensors"], r"str cannot rank.*protocol Scorer"),
        (Warm, r"Warm is a class.*give an object, Warm\(\.\.\.\)"),
    ],
)
def test_what_cannot_rank_is_refused_at_construction(make_dalle, given, message):
    tokenizer = BPETokenizer.train(["a red apple"], 300)
    dalle = make_dalle(text_vocab_size=tokenizer.vocab_size)
    dalle.text_tokenizer = tokenizer
    with pytest.raises(ValueError, match=message):
        dalle_pytorch.Generator(dalle, given)
    with pytest.raises(ValueError, match=message):
        Request.of("a red apple", 7, num_images=4, clip=given)


def test_a_clip_without_text_tokenizer_is_refused_at_construction(tiny_clip):
    with pytest.raises(ValueError, match="no text tokenizer"):
        as_scorers([Warm(), tiny_clip])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(3), r"Odd.score gave a tensor of shape \(3,\) for 4 images"),
        (torch.zeros(4, 1), r"Odd.score gave a tensor of shape \(4, 1\) for 4 images"),
        ([0.1, 0.2, 0.3, 0.4], "Odd.score gave a list for 4 images"),
        (None, "Odd.score gave a NoneType"),
        (torch.tensor([0.1, torch.nan, 0.3, torch.inf]), "Odd.score gave numbers that are not finite for 2 of 4"),
    ],
)
def test_scores_that_do_not_fit_name_their_scorer(scores, message):
    images = torch.rand(4, 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        score(images, "red", [Warm(), Odd(scores)])


def test_whole_numbers_with_gradients_are_scores_too():
    images = torch.rand(3, 3, 4, 4)
    rows = score(images, "red", [Odd(torch.tensor([3, 1, 2])), Odd(torch.ones(3, requires_grad=True) * 2)])
    assert rows.tolist() == [[3.0, 1.0, 2.0], [2.0, 2.0, 2.0]]
    assert not rows.requires_grad


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
