"""Phrases told apart: the share that is right, the confusions, the captions that are compared."""

import pytest
import torch

from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.phrases import check_held_out, evaluate_phrases

MEASURE = Measure({"split": "val"}, rounds=50)
STYLES = ["noto emoji", "twemoji", "big noto emoji"]
CAPTIONS = ["a cat, twemoji", "a dog", "noto emoji of a cat", "a sun, big noto emoji", "a cup, twemoji"]


def test_the_share_and_the_confusions_by_hand():
    """A model that likes twemoji best, and of the last picture the big ones."""
    asked = []

    def score(places, captions):
        asked.append((list(places), list(captions)))
        likes = [
            2.0 * ("twemoji" in c) + 3.0 * ("big" in c and place == 4)
            for place, c in zip(places, captions, strict=True)
        ]
        return torch.tensor(likes)

    metrics, (table,) = evaluate_phrases(score, CAPTIONS, STYLES, MEASURE)
    told = metrics["phrases_told"]
    assert (told.value, told.count) == (0.25, 4)
    assert told.protocol["phrases"] == "noto emoji, twemoji, big noto emoji"
    assert table.rows == [
        ("noto emoji", "0", "1", "0"), ("twemoji", "0", "1", "1"), ("big noto emoji", "0", "1", "0")
    ]  # fmt: skip
    assert [places for places, _ in asked] == [[0, 2, 3, 4]] * 3  # the dog has no style
    assert asked[2][1] == [
        "a cat, big noto emoji", "big noto emoji of a cat", "a sun, big noto emoji", "a cup, big noto emoji"
    ]  # fmt: skip


def test_captions_without_phrases_are_named():
    with pytest.raises(ValueError, match=r"0 of 2 captions hold one of phrases=.*caption="):
        check_held_out(["a cat", "a dog"], STYLES)
    check_held_out(["a cat", "a dog"], [])
    check_held_out(CAPTIONS, STYLES)


def test_a_tie_counts_against_the_model():
    metrics, (table,) = evaluate_phrases(lambda places, captions: torch.zeros(4), CAPTIONS, STYLES, MEASURE)
    assert metrics["phrases_told"].value == 0
    assert [sum(map(int, row[1:])) for row in table.rows] == [1, 2, 1]
