"""Nearest training pictures: copies are found, honest pictures are not called so, and the test says what it can see."""

import pytest
import torch

from dalle_pytorch.evaluation import memorisation
from dalle_pytorch.evaluation.features import Extractor
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.memorisation import evaluate_memorisation
from dalle_pytorch.evaluation.page import Gallery, Table
from dalle_pytorch.evaluation.report import shown

MEASURE = Measure({"split": "val"}, rounds=50, halves=0)


def reconstruct(images):
    """An image tokenizer that keeps a picture's brightness at every place, in ten steps."""
    return (images.mean(dim=1, keepdim=True) * 10).round().div(10).expand_as(images).contiguous()


@pytest.fixture
def pictures(generator):
    """300 training pictures and 200 held-out ones of the same kind."""
    return torch.rand(500, 3, 4, 4, generator=generator).split([300, 200])


def evaluate(drawn, train, held_out, **settings):
    prompts = [f"prompt {i}" for i in range(len(drawn))]
    read = set()

    def pictures_at(places):
        read.update(places)
        return train[list(places)]

    found = evaluate_memorisation(
        drawn, prompts, held_out, pictures_at, len(train), reconstruct, MEASURE, how={"seed": 0}, **settings
    )
    assert read == set(range(len(train)))
    return found


def test_pictures_copied_exactly_are_seen_everywhere(pictures, tiny_clip):
    train, held_out = pictures
    colours = Extractor("colours", "mean", "00" * 32, tiny_clip, lambda images: images.mean(dim=(2, 3)))
    metrics, sections = evaluate(train[:40].view(20, 2, 3, 4, 4), train, held_out, extractors=[colours])
    for space in ("pixel", "colours"):
        assert metrics[f"nearest_train_{space}"].value == 0
        assert metrics[f"nearest_train_{space}"].count == 20  # prompts
        assert metrics[f"nearest_train_{space}_real"].value > 0
        assert metrics[f"nearest_train_{space}_nearer_than_real"].value == 1
    assert metrics["nearest_train_colours"].extractor == "colours (mean)"
    assert metrics["nearest_train_pixel"].protocol == {"split": "val", "seed": 0, "train_pictures": 300}
    assert metrics["nearest_train_pixel_real"].protocol == {"split": "val", "train_pictures": 300}
    assert [type(section) for section in sections] == [Table, Gallery] * 4
    rows = {row[0]: row[1:] for row in sections[2].rows}
    assert rows["drawn"] == (*[shown(0.0)] * 4, "100.0 %", "100.0 %")
    assert rows["held out"][4:] == ("", "")
    assert float(rows["held out"][0]) < float(rows["held out"][2]) < float(rows["held out"][3])


def test_pictures_copied_token_by_token_are_seen_through_the_tokenizer(pictures):
    """They differ from all training pictures as these are, by what the tokenizer loses."""
    train, held_out = pictures
    copies = reconstruct(train[:50])
    metrics, _ = evaluate(copies[:, None], train, held_out)
    assert metrics["nearest_train_decoded_pixel"].value == 0
    assert metrics["nearest_train_decoded_pixel_nearer_than_reconstructed"].value == 1
    assert metrics["nearest_train_decoded_pixel_reconstructed"].value > 0
    assert metrics["nearest_train_pixel"].value > 0
    assert not [name for name in metrics if name.startswith("nearest_train_decoded_pixel_copies")]


def test_what_copies_would_give_is_told(pictures, monkeypatch):
    """All training pictures as copies and as drawn ones: the same distances, the same shares."""
    monkeypatch.setattr(memorisation, "COPIES", 300)
    train, held_out = pictures
    metrics, _ = evaluate(reconstruct(train)[:, None], train, held_out)
    for end in ("", "_nearer_than_real", "_nearer_than_reconstructed"):
        assert metrics[f"nearest_train_pixel_copies{end}"].value == metrics[f"nearest_train_pixel{end}"].value
    assert metrics["nearest_train_pixel_copies"].count == 300


def test_half_copies_are_half(pictures):
    train, held_out = pictures
    drawn = torch.stack([train[:30], torch.full((30, 3, 4, 4), 9.0)], dim=1)
    assert evaluate(drawn, train, held_out).metrics["nearest_train_pixel_nearer_than_real"].value == 0.5


def test_pictures_like_the_held_out_ones_are_not_called_copies(pictures):
    """The held-out pictures themselves: two of 200 lie below their own 1 % quantile."""
    train, held_out = pictures
    metrics, _ = evaluate(held_out[:, None], train, held_out)
    assert metrics["nearest_train_pixel"].value == metrics["nearest_train_pixel_real"].value
    assert metrics["nearest_train_pixel_nearer_than_real"].value == 2 / 200
    metrics, _ = evaluate(reconstruct(held_out)[:, None], train, held_out)
    for space in ("pixel", "decoded_pixel"):
        assert metrics[f"nearest_train_{space}"].value == metrics[f"nearest_train_{space}_reconstructed"].value
        assert metrics[f"nearest_train_{space}_nearer_than_reconstructed"].value <= 2 / 200


def test_distances_are_those_of_a_double_loop(pictures):
    train, held_out = pictures
    metrics, _ = evaluate(held_out[:4, None], train, held_out)
    for name, pool in (("pixel", train), ("decoded_pixel", reconstruct(train))):
        each = [min((a - b).square().mean().sqrt().item() for b in pool) for a in held_out[:4]]
        assert metrics[f"nearest_train_{name}"].value == pytest.approx(sum(each) / 4, rel=1e-5)


def test_chunks_change_no_number(pictures, monkeypatch):
    train, held_out = pictures
    first = evaluate(held_out[:, None], train, held_out).metrics
    monkeypatch.setattr(memorisation, "TOGETHER", 7)
    assert evaluate(held_out[:, None], train, held_out).metrics == first


def test_a_quantile_of_few_is_left_out(pictures):
    train, held_out = pictures
    few, enough = (evaluate(train[:4, None], train, held_out[:count]) for count in (99, 100))
    assert not [name for name in few.metrics if "nearer" in name]
    assert len([name for name in enough.metrics if "nearer" in name]) == 5
    assert few.sections[0].rows[0][-1] == ""


def test_no_training_pictures(pictures):
    with pytest.raises(ValueError, match="no training pictures"):
        evaluate(pictures[1][:4, None], pictures[0][:0], pictures[1])
