"""Nearest rows: exact, whatever the chunks."""

import pytest
import torch

from dalle_pytorch.evaluation import nearest
from dalle_pytorch.evaluation.nearest import nearer, nobody, pixels


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
    monkeypatch.setattr(nearest, "ROWS", 3)
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
