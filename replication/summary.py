"""From the numbers of arms and seeds to means, spreads and verdicts."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.report import shown
from replication.experiment import Number, Side, numbers, parse

Values = Mapping[str, Mapping[int, Mapping[str, float]]]
"""arm -> seed -> name -> number."""

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""


class Verdict(NamedTuple):
    """One comparison, over seeds."""

    text: str
    difference: float
    """Mean of what the greater side is above the smaller."""
    margin: float
    """Half of the 95 % interval of it, from seeds; infinite for one seed."""

    @property
    def word(self) -> str:
        """Whether the interval lies above 0, below, or holds it."""
        if self.difference - self.margin > 0:
            return "holds"
        return "does not hold" if self.difference + self.margin < 0 else "undecided"


def judge(text: str, values: Values) -> list[Verdict]:
    """The comparisons of one expectation, paired by seed: what seeds share, the order of the data, cancels.

    Raises:
        ValueError: a number that the arms do not have, or seeds that not all of them have.
    """
    verdicts = []
    for claim in parse(text):
        greater, smaller = (_of(side, values) for side in claim)
        if not greater and not smaller:
            raise UserError(f"expect: {text!r} compares two constants")
        seeds = sorted(greater or smaller)
        if greater and smaller and set(greater) != set(smaller):
            raise UserError(f"expect: {text!r} compares seeds {sorted(greater)} with {sorted(smaller)}")
        above = [_at(claim.greater, greater, seed) - _at(claim.smaller, smaller, seed) for seed in seeds]
        verdicts.append(Verdict(" > ".join(map(_text, claim)), statistics.fmean(above), margin(above)))
    return verdicts


def overall(verdicts: Sequence[Verdict]) -> str:
    """Of a claim with several comparisons: it holds when all do, and falls with one."""
    words = {verdict.word for verdict in verdicts}
    if "does not hold" in words:
        return "does not hold"
    return "undecided" if "undecided" in words else "holds"


def margin(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean, Student's t; infinite for one value.

    Raises:
        ValueError: more than ten values, for which there is no table here.
    """
    if len(values) < 2:
        return math.inf
    if len(values) - 2 >= len(QUANTILES):
        raise UserError(f"{len(values)} seeds given, the table of Student's t ends at {len(QUANTILES) + 1}")
    return QUANTILES[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def table(values: Values, names: Sequence[str], axis: str) -> str:
    """Markdown: a row an arm, mean and standard deviation over seeds."""
    lines = [f"| {axis} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, seeds in values.items():
        cells = [_cell([numbers[name] for numbers in seeds.values() if name in numbers]) for name in names]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: list[float]) -> str:
    if not found:
        return "-"
    text = shown(statistics.fmean(found))
    return text if len(found) == 1 else f"{text} ± {shown(statistics.stdev(found))}"


def verdict_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line each: the comparison, the difference, the word."""
    return [
        f"{verdict.text}: by {shown(verdict.difference)}"
        + (f" ± {shown(verdict.margin)}" if math.isfinite(verdict.margin) else " (one seed)")
        + f", {verdict.word}"
        for verdict in verdicts
    ]


def _of(side: Side, values: Values) -> dict[int, float]:
    """A side of each seed; nothing for a constant."""
    found: dict[int, float] = {}
    for sign, number in zip((1, -1), numbers(side), strict=False):
        each = _number(number, values)
        if found and set(found) != set(each):
            raise UserError(f"expect: {_text(side)} takes seeds {sorted(each)} from {sorted(found)}")
        found = {seed: found.get(seed, 0.0) + sign * value for seed, value in each.items()}
    return found


def _number(number: Number, values: Values) -> dict[int, float]:
    for seed, found in values[number.arm].items():
        if number.metric not in found:
            raise UserError(f"expect: arm {number.arm}, seed {seed} has no {number.metric}; it has {', '.join(found)}")
    return {seed: found[number.metric] for seed, found in values[number.arm].items()}


def _at(side: Side, found: Mapping[int, float], seed: int) -> float:
    return found[seed] if numbers(side) else side  # type: ignore[return-value]


def _text(side: Side) -> str:
    return " - ".join(f"{number.metric}[{number.arm}]" for number in numbers(side)) or f"{side:g}"
