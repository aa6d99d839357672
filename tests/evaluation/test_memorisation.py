"""Nearest training pictures: exact, whatever the chunks; copies are found, honest pictures are not called so."""

import pytest
import torch

from dalle_pytorch.evaluation import memorisation
from dalle_pytorch.evaluation.features import Extractor
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.memorisation import evaluate_memorisation, nearer, nobody, pixels
from dalle_pytorch.evaluation.page import Picture, Table

MEASURE = Measure({"split": "val"}, rounds=50, halves=0)


def look_up(queries, rows, size):
    found = nobody(len(queries))
    for first in range(0, len(rows), size):
        found = nearer(found, queries, rows[first : first + size], first)
    return found


def test_nearest_rows_are_those_of_a_double_loop_in_any_chunks(generator, monkeypatch):
    queries, rows = torch.randn(7, 5, generator=generator), torch.randn(23, 5, generator=generator)
    each = torch.stack([torch.stack([(q.double() - r.double()).norm() for r in rows]) for q in queries])
    whole = look_up(queries, rows, 23)
    assert torch.equal(whole.indices, each.argmin(dim=1))
    torch.testing.assert_close(whole.distances, each.amin(dim=1), atol=1e-14, rtol=0)
    monkeypatch.setattr(memorisation, "ROWS", 3)
    for size in (1, 4, 22):
        assert all(torch.equal(a, b) for a, b in zip(look_up(queries, rows, size), whole, strict=True))


def test_a_copy_is_at_distance_zero_and_a_near_one_exactly_as_near_as_it_is(generator):
    """Distances over products lose small differences of large numbers; in 32 bits this one, of 1000, entirely."""
    rows = 1000 + torch.randn(50, 8, generator=generator)
    queries = rows[[7, 31]].clone()
    queries[1, 0] += 2**-10
    found = look_up(queries, rows, 16)
    assert found.indices.tolist() == [7, 31]
    assert found.distances[0] == 0
    assert found.distances[1].item() == pytest.approx(2**-10, rel=1e-12)


def test_of_equal_rows_the_first_counts():
    rows = torch.zeros(6, 2)
    assert look_up(torch.ones(1, 2), rows, 2).indices.tolist() == [0]


def test_rows_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="5 columns, generated ones 4"):
        nearer(nobody(2), torch.zeros(2, 4), torch.zeros(3, 5), 0)
    with pytest.raises(ValueError, match="NaN"):
        nearer(nobody(2), torch.full((2, 4), torch.nan), torch.zeros(3, 4), 0)


def test_pixel_distances_are_root_mean_squares(generator):
    a, b = torch.rand(2, 1, 3, 4, 4, generator=generator)
    found = look_up(pixels(a), pixels(b), 1)
    assert found.distances.item() == pytest.approx((a - b).square().mean().sqrt().item(), rel=1e-6)


@pytest.fixture
def pictures(generator):
    """300 training pictures and 200 held-out ones of the same kind."""
    return torch.rand(500, 3, 4, 4, generator=generator).split([300, 200])


def evaluate(drawn, train, held_out, **settings):
    prompts = [f"prompt {i}" for i in range(len(drawn))]
    read = []

    def pictures_at(places):
        read.extend(places)
        return train[list(places)]

    found = evaluate_memorisation(
        drawn, prompts, {"real": held_out, "reconstructed": held_out.round()}, pictures_at, len(train), MEASURE,
        how={"seed": 0}, **settings,
    )  # fmt: skip
    assert set(read) == set(range(len(train)))
    return found


def test_copies_are_seen(pictures, tiny_clip):
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
    assert [type(section) for section in sections] == [Table, Picture, Table, Picture]
    rows = {row[0]: row[1:] for row in sections[0].rows}
    assert rows["drawn"] == ("0.0000", "0.0000", "0.0000", "0.0000", "")
    assert rows["held out"][-1] == "100.0 %"
    assert float(rows["held out"][0]) < float(rows["held out"][2]) < float(rows["held out"][3])


def test_half_copies_are_half(pictures, generator):
    train, held_out = pictures
    drawn = torch.stack([train[:30], torch.full((30, 3, 4, 4), 9.0)], dim=1)
    metrics, _ = evaluate(drawn, train, held_out)
    assert metrics["nearest_train_pixel_nearer_than_real"].value == 0.5


def test_pictures_like_the_held_out_ones_are_not_called_copies(pictures):
    """The held-out pictures themselves: two of 200 lie below their own 1 % quantile."""
    train, held_out = pictures
    metrics, _ = evaluate(held_out[:, None], train, held_out)
    assert metrics["nearest_train_pixel"].value == metrics["nearest_train_pixel_real"].value
    assert metrics["nearest_train_pixel_nearer_than_real"].value == 2 / 200
    reconstructed = look_up(pixels(held_out.round()), pixels(train), 300).distances.mean().item()
    assert metrics["nearest_train_pixel_reconstructed"].value == pytest.approx(reconstructed)


def test_chunks_change_no_number(pictures, monkeypatch):
    train, held_out = pictures
    first = evaluate(held_out[:, None], train, held_out).metrics
    monkeypatch.setattr(memorisation, "TOGETHER", 7)
    assert evaluate(held_out[:, None], train, held_out).metrics == first


def test_a_quantile_of_few_is_left_out(pictures):
    train, held_out = pictures
    names = set(evaluate(train[:4, None], train, held_out[:99]).metrics)
    assert names == {f"nearest_train_pixel{end}" for end in ("", "_real", "_reconstructed")}
    assert len(evaluate(train[:4, None], train, held_out[:100]).metrics) == 5


def test_no_training_pictures(pictures):
    with pytest.raises(ValueError, match="no training pictures"):
        evaluate(pictures[1][:4, None], pictures[0][:0], pictures[1])
