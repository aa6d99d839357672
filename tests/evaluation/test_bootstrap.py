"""Intervals: as wide as theory says, around the value, from the generator given."""

import pytest
import torch

from dalle_pytorch.evaluation.bootstrap import bootstrap_mean, half_samples, unanimous
from dalle_pytorch.evaluation.distribution import frechet_distance, kernel_distance
from dalle_pytorch.evaluation.measure import Measure


def test_the_interval_of_a_mean_is_that_of_the_normal_theory(generator):
    values = torch.randn(400, generator=generator)
    low, high = bootstrap_mean(values, generator)
    half = 1.96 * values.std().item() / 20
    assert low == pytest.approx(values.mean().item() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.15 * half)
    narrow = bootstrap_mean(values, generator, level=0.5)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) * 0.6745 / 1.96, rel=0.15)


def test_it_covers_the_truth_as_often_as_it_says(generator):
    covered = 0
    for _ in range(150):
        low, high = bootstrap_mean(torch.rand(30, generator=generator), generator, rounds=200)
        covered += low <= 0.5 <= high
    assert 0.87 <= covered / 150 <= 0.99


@pytest.mark.parametrize(("count", "student"), [(8, 2.365), (16, 2.131)])
def test_intervals_of_few_samples_are_as_wide_as_students(generator, count, student):
    """Two-sided 95 % quantiles of 7 and 15 degrees of freedom; plain percentiles reach 1.83 and 1.90 errors."""
    ratios = []
    for _ in range(40):
        values = torch.randn(count, generator=generator)
        low, high = bootstrap_mean(values, generator, rounds=2000)
        ratios.append((high - low) / 2 / (values.std().item() / count**0.5))
    assert sum(ratios) / 40 == pytest.approx(student, rel=0.06)


def test_the_same_generator_gives_the_same_interval():
    values = torch.rand(20)
    first, second, other = (bootstrap_mean(values, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_a_ratio_of_sums_is_drawn_sample_by_sample(generator):
    """Equal weights are a mean; nats in proportion to tokens have no spread."""
    values, tokens = torch.rand(20), torch.randint(1, 9, (20,)).double()
    seeds = [torch.Generator().manual_seed(1) for _ in "ab"]
    low, high = bootstrap_mean(values, seeds[0])
    assert bootstrap_mean(values, seeds[1], weights=torch.full((20,), 2.0)) == pytest.approx((low / 2, high / 2))
    assert bootstrap_mean(3 * tokens, generator, weights=tokens) == pytest.approx((3, 3))


def test_a_share_of_all_or_none_is_as_sure_as_a_binomial():
    """At the far end it happens with 2.5 %: (1 - p) ** n."""
    assert (1 - unanimous(16)) ** 16 == pytest.approx(0.025)
    measure = Measure({}, rounds=20)
    none, every = torch.zeros(16), torch.full((16,), 100.0)
    assert measure.mean(none, most=1).interval == (0, pytest.approx(0.2059, abs=1e-4))
    assert measure.mean(every, most=100).interval == (pytest.approx(79.41, abs=1e-2), 100)
    assert measure.mean(none).interval == (0, 0)  # no share: an error of 0 may be known
    some = torch.tensor([0.0, 1.0] * 8)
    assert measure.mean(some, most=1).interval == measure.mean(some).interval


def test_constant_values_have_no_spread(generator):
    assert bootstrap_mean(torch.full((9,), 0.25), generator) == (0.25, 0.25)


def test_halves_spread_as_the_whole_does(generator):
    """For a difference of means the standard error is known: sqrt(1/n + 1/m)."""

    def difference(real, generated):
        return (generated.mean() - real.mean()).item()

    real, generated = torch.randn(100, 1, generator=generator), torch.randn(300, 1, generator=generator)
    low, high = half_samples(difference, real, generated, generator, rounds=1000)
    width = 2 * 1.96 * (real.var() / 100 + generated.var() / 300).sqrt().item()
    assert high - low == pytest.approx(width, rel=0.12)
    assert (low + high) / 2 == pytest.approx(difference(real, generated), abs=0.05 * width)


def test_the_interval_of_a_distance_covers_the_truth(generator):
    """Which for KID, without bias, is the mean of many values."""

    def pair():
        return torch.randn(40, 3, generator=generator), torch.randn(40, 3, generator=generator) + 0.8

    truth = sum(kernel_distance(*pair()) for _ in range(400)) / 400
    covered = 0
    for _ in range(60):
        low, high = half_samples(kernel_distance, *pair(), generator, rounds=20)
        covered += low <= truth <= high
    assert 0.83 <= covered / 60 <= 1


def test_samples_of_a_group_are_drawn_together(generator):
    """Ten equal pictures a prompt are worth one: the interval is that of the prompts."""

    def difference(real, generated):
        return (generated.mean() - real.mean()).item()

    real, prompts = torch.zeros(8, 1), torch.randn(40, 1, generator=generator)
    pictures = prompts.repeat_interleave(10, dim=0)
    seeds = [torch.Generator().manual_seed(1) for _ in "ab"]
    of_prompts = half_samples(difference, real, prompts, seeds[0])
    assert half_samples(difference, real, pictures, seeds[1], group=10) == pytest.approx(of_prompts, abs=1e-6)
    alone = half_samples(difference, real, pictures, generator)
    assert alone[1] - alone[0] < 0.5 * (of_prompts[1] - of_prompts[0])
    with pytest.raises(ValueError, match="groups of 7"):
        half_samples(difference, real, pictures, generator, group=7)


def test_pairs_are_drawn_together(generator):
    """Of a reconstruction with a constant error the difference has no spread, however the pictures differ."""

    def difference(real, generated):
        return (generated.mean() - real.mean()).item()

    real = torch.randn(40, 1, generator=generator)
    low, high = half_samples(difference, real, real + 0.25, generator, paired=True)
    assert (low, high) == pytest.approx((0.25, 0.25), abs=1e-6)
    low, high = half_samples(difference, real, real + 0.25, generator)
    assert high - low > 0.4
    for generated, group in ((real[:39], 1), (real, 2)):
        with pytest.raises(ValueError, match="are no pairs"):
            half_samples(difference, real, generated, generator, group=group, paired=True)


def test_an_interval_does_not_leave_what_is_possible(generator):
    rows = torch.rand(8, 2)
    low, high = half_samples(lambda real, generated: float(real.mean()), rows, rows, generator, bounds=(0.45, 0.46))
    assert 0.45 <= low <= high <= 0.46


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_the_interval_of_a_distance_holds_the_value(distance, generator):
    """Which the ordinary bootstrap's does not: twins make it higher."""
    real, generated = torch.randn(40, 8, generator=generator), torch.randn(40, 8, generator=generator)
    value = distance(real, generated)
    low, high = half_samples(distance, real, generated, generator)
    assert low < value < high
    if distance is frechet_distance:
        twins = [
            distance(*(part[torch.randint(40, (40,), generator=generator)] for part in (real, generated)))
            for _ in range(50)
        ]
        assert sorted(twins)[2] > value


def test_settings_and_samples_out_of_range_are_refused(generator):
    with pytest.raises(ValueError, match="1 samples given, at least 2"):
        bootstrap_mean(torch.rand(1), generator)
    with pytest.raises(ValueError, match="values to bootstrap: 1 of 2"):
        bootstrap_mean(torch.tensor([1.0, torch.nan]), generator)
    with pytest.raises(ValueError, match="rounds"):
        bootstrap_mean(torch.rand(3), generator, rounds=1)
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean(torch.rand(3), generator, level=1.0)
    with pytest.raises(ValueError, match="at least 4"):
        half_samples(frechet_distance, torch.rand(3, 2), torch.rand(9, 2), generator)
