"""Distances between sets of features: closed forms, other implementations, failures."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from dalle_pytorch.evaluation.distribution import (
    cmmd,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

SCIPY_FID = 1.3759717689949236  # 1.17.1, reference/classical.py
DISTANCES = [frechet_distance, kernel_distance, cmmd]


@pytest.fixture
def features(classical):
    """The fixed real and generated features."""
    return tuple(torch.from_numpy(part) for part in classical.features())


def numpy_fid(real: np.ndarray, generated: np.ndarray) -> float:
    """By the eigenvalues of the product of covariances, whose roots add up to the trace of its root."""
    s1, s2 = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    shift = real.mean(axis=0) - generated.mean(axis=0)
    roots = np.sqrt(np.clip(np.linalg.eigvals(s1 @ s2).real, 0, None))
    return float(shift @ shift + np.trace(s1 + s2) - 2 * roots.sum())


def test_fid_is_that_of_scipy_numpy_and_torchmetrics(features):
    real, generated = features
    value = frechet_distance(real, generated)
    assert value == pytest.approx(SCIPY_FID, rel=1e-9)
    assert value == pytest.approx(numpy_fid(real.numpy(), generated.numpy()), rel=1e-9)
    theirs = _compute_fid(real.mean(dim=0), real.T.cov(), generated.mean(dim=0), generated.T.cov())
    assert value == pytest.approx(theirs.item(), rel=1e-6)


def test_fid_in_closed_form(generator):
    real = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    shift = torch.tensor([1.0, 0, -2, 0, 0.5])
    assert frechet_distance(real, real + shift) == pytest.approx(5.25)
    trace = real.var(dim=0).sum().item()
    centred = real - real.mean(dim=0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * trace)  # (3 - 1) ** 2


def test_fid_with_fewer_samples_than_features(generator):
    """Singular covariances, where a matrix root may not converge."""
    real = torch.randn(6, 20, generator=generator, dtype=torch.float64)
    generated = torch.randn(7, 20, generator=generator, dtype=torch.float64)
    assert frechet_distance(real, generated) == pytest.approx(numpy_fid(real.numpy(), generated.numpy()), rel=1e-4)
    assert frechet_distance(real, real + 1) == pytest.approx(20)


def test_kid_is_that_of_torchmetrics_and_of_a_double_loop(features):
    real, generated = features[0][:50], features[1]
    value = kernel_distance(real, generated)
    assert value == pytest.approx(poly_mmd(real, generated).item(), rel=1e-9)
    few, more = real[:4], generated[:5]  # torchmetrics' needs equal counts

    def kernel(x, y):
        return (float(x @ y) / 6 + 1) ** 3

    by_hand = sum(kernel(few[i], few[j]) for i in range(4) for j in range(4) if i != j) / 12
    by_hand += sum(kernel(more[i], more[j]) for i in range(5) for j in range(5) if i != j) / 20
    by_hand -= 2 * sum(kernel(x, y) for x in few for y in more) / 20
    assert kernel_distance(few, more) == pytest.approx(by_hand)


def test_kid_is_unbiased(generator):
    """Of equal distributions it is 0 on average, also for few samples."""
    values = [
        kernel_distance(torch.randn(8, 3, generator=generator), torch.randn(8, 3, generator=generator))
        for _ in range(400)
    ]
    mean, error = np.mean(values), np.std(values) / 20
    assert abs(mean) < 3 * error
    assert min(values) < 0


def test_cmmd_is_that_of_its_definition(features):
    """Straight from the reference's formula: squares of norms and products, means with the diagonal."""
    x, y = (part.numpy() / np.linalg.norm(part.numpy(), axis=1, keepdims=True) for part in features)

    def mean(a, b):
        return np.mean([[math.exp(-((p - q) @ (p - q)) / 200) for q in b] for p in a])

    assert cmmd(*features) == pytest.approx(1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y)), rel=1e-8)
    assert cmmd(features[0], 5 * features[0]) == pytest.approx(0, abs=1e-9)  # lengths do not count


def test_cmmd_of_two_points():
    """Opposite unit vectors are 2 apart: 1000 (1 + 1 - 2 exp(-4 / 200))."""
    x = torch.tensor([[1.0, 0], [1, 0]])
    assert cmmd(x, -x) == pytest.approx(2000 * (1 - math.exp(-0.02)), rel=1e-9)


def test_precision_and_recall_of_known_supports():
    """Real: two clusters. Generated: one of them and one elsewhere: half is right, half is found."""
    cluster = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    real, generated = torch.cat([cluster, cluster + 100]), torch.cat([cluster + 0.1, cluster - 100])
    assert precision_recall(real, generated) == (0.5, 0.5)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, cluster.repeat(2, 1)) == (1, 0.5)  # variety is lost, not quality
    assert precision_recall(real, real + 1000) == (0, 0)


def test_precision_by_a_loop(generator):
    real, generated = torch.randn(50, 3, generator=generator), 1.5 * torch.randn(60, 3, generator=generator)
    found = []
    for neighbours in (1, 2, 3, 5):
        radii = [
            sorted((row - other).norm().item() for other in real)[neighbours] for row in real
        ]  # the first is itself
        inside = [
            any((g - r).norm().item() <= radius for r, radius in zip(real, radii, strict=True)) for g in generated
        ]
        found.append(precision_recall(real, generated, neighbours=neighbours).precision)
        assert found[-1] == pytest.approx(np.mean(inside))
    assert len(set(found)) == 4


def test_the_rim_of_a_ball_belongs_to_it():
    """Numbers 0 to 3, each with its nearest 1 away: -1 and 4 lie on a rim, -2 outside."""
    real = torch.arange(4.0)[:, None]
    assert precision_recall(real, torch.tensor([[-1.0], [4], [-2], [1.5]]), neighbours=1).precision == 0.75


def test_inception_score_in_closed_form():
    sure = 100 * torch.eye(4).repeat(3, 1)
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(torch.zeros(6, 4)) == pytest.approx(1)
    assert inception_score(sure[[0, 0, 0, 0]]) == pytest.approx(1)  # sure, and always the same
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]])  # mean (0.5, 0.5)
    divergence = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert inception_score(p.log()) == pytest.approx(math.exp(divergence))
    parts = torch.cat([sure[:4], sure[[0, 0, 0, 0]]])
    assert inception_score(parts, splits=2) == pytest.approx((4 + 1) / 2)


@pytest.mark.parametrize("distance", [*DISTANCES, precision_recall])
def test_what_cannot_be_compared_is_refused_with_the_mend(distance):
    rows = torch.rand(6, 3)
    with pytest.raises(ValueError, match=r"real features have 3 columns, generated ones 4: .*one extractor"):
        distance(rows, torch.rand(6, 4))
    with pytest.raises(ValueError, match=r"generated features: 1 samples given, at least [24] .*evaluate on more"):
        distance(rows, rows[:1])
    broken = rows.clone()
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"real features: 1 of 6 samples are NaN.*number 2; .*fp32"):
        distance(broken, rows)
    with pytest.raises(ValueError, match="generated features: 1 of 6 samples"):
        distance(rows, broken.nan_to_num(math.inf))


def test_scores_out_of_range_are_refused():
    with pytest.raises(ValueError, match="20 are needed"):
        inception_score(torch.zeros(6, 4), splits=10)
    with pytest.raises(ValueError, match="class scores: 1 of 6"):
        inception_score(torch.zeros(6, 4).index_fill(0, torch.tensor([3]), math.nan))
    with pytest.raises(ValueError, match="splits"):
        inception_score(torch.zeros(6, 4), splits=0)
    with pytest.raises(ValueError, match="neighbours"):
        precision_recall(torch.rand(6, 3), torch.rand(6, 3), neighbours=0)


@pytest.mark.parametrize("distance", DISTANCES)
def test_more_of_the_same_shifts_make_it_larger(distance, generator):
    real = torch.randn(50, 4, generator=generator) + 2
    values = [distance(real, real + shift * torch.tensor([1.0, 0, 0, 0])) for shift in (0, 1, 2)]
    assert values[0] < values[1] < values[2]
