"""Means, spreads and verdicts over seeds."""

import math

import numpy as np
import pytest

from replication.summary import QUANTILES, Verdict, judge, margin, overall, table, verdict_lines


def values(**arms):
    return {arm: {seed: {"l1": float(x)} for seed, x in enumerate(found)} for arm, found in arms.items()}


def test_the_quantiles_cover_95_percent():
    """Of a million simulated means of normal samples, 95 % lie within the margin of 0."""
    random = np.random.default_rng(0)
    for count in (2, 3, 6, 10):
        draws = random.standard_normal((200_000, count))
        half = QUANTILES[count - 2] * draws.std(axis=1, ddof=1) / math.sqrt(count)
        assert (np.abs(draws.mean(axis=1)) <= half).mean() == pytest.approx(0.95, abs=0.003)


def test_margin_by_hand():
    assert margin([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert margin([5.0]) == math.inf
    with pytest.raises(ValueError, match="11 seeds given"):
        margin([0.0] * 11)


def test_what_seeds_share_cancels():
    """Far apart between seeds, but always by the same difference."""
    (verdict,) = judge("l1[a] > l1[b]", values(a=[1, 50, 900], b=[0.9, 49.9, 899.9]))
    assert verdict.difference == pytest.approx(0.1)
    assert verdict.word == "holds"
    (opposite,) = judge("l1[b] > l1[a]", values(a=[1, 50, 900], b=[0.9, 49.9, 899.9]))
    assert opposite.word == "does not hold"


@pytest.mark.parametrize(("found", "word"), [([1, -1, 1], "undecided"), ([1.0], "undecided"), ([1, 1.1, 0.9], "holds")])
def test_a_difference_within_the_noise_of_seeds_is_undecided(found, word):
    (verdict,) = judge("l1[a] > 0", values(a=found))
    assert verdict.word == word


def test_a_chain_is_one_verdict_for_each_neighbour():
    verdicts = judge("l1[a] < l1[b] < l1[c]", values(a=[1, 1.1], b=[2, 2.1], c=[1.5, 1.6]))
    assert [verdict.word for verdict in verdicts] == ["does not hold", "holds"]
    assert overall(verdicts) == "does not hold"
    assert overall(verdicts[1:]) == "holds"
    assert overall([*verdicts[1:], Verdict("", 1.0, 2.0)]) == "undecided"


def test_a_difference_is_of_one_seed_at_a_time():
    found = values(a=[1, 50, 900], b=[0.9, 49.91, 899.9], c=[1])
    (verdict,) = judge("l1[a] - l1[b] < 0.2", found)
    assert verdict.text == "0.2 > l1[a] - l1[b]"
    assert verdict.difference == pytest.approx(0.2 - (0.1 + 0.09 + 0.1) / 3)
    assert verdict.word == "holds"
    with pytest.raises(ValueError, match=r"l1\[a\] - l1\[c\] takes seeds \[0\] from \[0, 1, 2\]"):
        judge("l1[a] - l1[c] < 0.2", found)


def test_numbers_and_seeds_that_are_missing_are_named():
    with pytest.raises(ValueError, match=r"arm a, seed 0 has no psnr; it has l1"):
        judge("psnr[a] > 3", values(a=[1]))
    with pytest.raises(ValueError, match=r"compares seeds \[0, 1\] with \[0\]"):
        judge("l1[a] > l1[b]", values(a=[1, 2], b=[1]))
    with pytest.raises(ValueError, match="compares two constants"):
        judge("2 > 1", values(a=[1, 2]))


def test_table_and_lines_show_mean_and_spread():
    found = values(a=[1, 2, 3], b=[4])
    rows = table(found, ["l1", "none"], "arm").splitlines()
    assert rows[0] == "| arm | l1 | none |"
    assert rows[2] == "| a | 2.000 ± 1.000 | - |"
    assert rows[3] == "| b | 4.000 | - |"
    assert verdict_lines(judge("l1[a] > 1", found)) == ["l1[a] > 1: by 1.000 ± 2.484, undecided"]
    assert verdict_lines(judge("l1[b] > 1", found)) == ["l1[b] > 1: by 3.000 (one seed), undecided"]
