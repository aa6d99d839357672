"""What one replication is: a claim, arms that differ in one thing, seeds, what to measure, and what the claim says."""

import itertools
import re
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from dalle_pytorch.errors import UserError, at_least_one

NUMBER = r"([\w.+-]+)\[([^\]]+)\]"  # psnr[arm]
SIDE = re.compile(rf"{NUMBER}(?: - {NUMBER})?")
CONSTANT = re.compile(r"-?[\d.]+(e-?\d+)?")


@dataclass(kw_only=True)
class ReplicateConfig:
    """Settings of ``python -m replication``."""

    name: str = "???"
    """Of the experiment, and of its folder."""
    row: str = ""
    """Its number in docs/replication.md."""
    claim: str = "???"
    """What is said."""
    source: str = "???"
    """Who says it, and where."""
    run: str = "???"
    """What an arm does, one of ``arms.RUNS``."""
    base: list[str] = field(default_factory=list)
    """Settings of all arms: of the training, or of the run's own dataclass, as on a command line."""
    arms: dict[str, list[str]] = field(default_factory=dict)
    """Name of an arm, and the settings in which it differs."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each arm is run once for each."""
    minutes: float = 0.0
    """That an arm takes on one core, roughly."""
    shown: list[str] = field(default_factory=list)
    """Numbers in table and plot, in order."""
    expect: list[str] = field(default_factory=list)
    """What the claim predicts: ``psnr[6.6] > psnr[0]``; also with constants, as a chain, a > b > c, and of differences,
    ``psnr[6.6] - psnr[0] < 0.1``."""
    axis: str = "arm"
    """What the arms' names mean; the plot has a scale where they are numbers."""
    log_x: bool = False
    """Whether that scale is logarithmic."""
    curve_axis: str = ""
    """Horizontal axis of the curves that a run gives; "" = they are not drawn."""
    log_curves: bool = False
    """Whether it is logarithmic."""
    out: str = "runs/replicate"
    """Folder of all experiments; what is there already is not run again."""
    publish: str | None = None
    """Folder to which the plot and the numbers are copied at the end, as docs/replication."""
    jobs: int = 1
    """Arms at a time; they share the cores."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: no arms or seeds, a seed twice, or an expectation that cannot be read or names no arm.
        """
        if not self.arms or not self.seeds:
            raise UserError(f"arms ({list(self.arms)}) and seeds ({self.seeds}) must not be empty")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds must differ, got {self.seeds}")
        at_least_one(self, "jobs")
        for text in self.expect:
            for number in (number for claim in parse(text) for side in claim for number in numbers(side)):
                if number.arm not in self.arms:
                    raise UserError(f"expect: {text!r} names the arm {number.arm!r}; there are {', '.join(self.arms)}")


class Number(NamedTuple):
    """A number of an arm."""

    metric: str
    arm: str


class Difference(NamedTuple):
    """Of one number from another, seed by seed."""

    first: Number
    second: Number


Side: TypeAlias = Number | Difference | float


class Claim(NamedTuple):
    """One number above another."""

    greater: Side
    smaller: Side


def numbers(side: Side) -> list[Number]:
    """What a side is made of; nothing for a constant."""
    if isinstance(side, Difference):
        return list(side)
    return [side] if isinstance(side, Number) else []


def parse(text: str) -> list[Claim]:
    """``a[x] > b[y] > 2`` as pairs of neighbours; all signs of a chain must be alike.

    Raises:
        UserError: it cannot be read.
    """
    signs = set(re.findall(r" ([<>]) ", text))
    parts = [part.strip() for part in re.split(r" [<>] ", text)]
    if len(signs) != 1 or len(parts) < 2 or not all(SIDE.fullmatch(part) or CONSTANT.fullmatch(part) for part in parts):
        raise UserError(f"expect: {text!r} is not like 'psnr[a] > psnr[b]' or 'gap[a] < 0.1'")
    sides = [_side(part) for part in parts]
    if signs == {"<"}:
        sides.reverse()
    return [Claim(*pair) for pair in itertools.pairwise(sides)]


def _side(part: str) -> Side:
    found = SIDE.fullmatch(part)
    if found is None:
        return float(part)
    first, second = Number(*found.groups()[:2]), found.groups()[2:]
    return first if second[0] is None else Difference(first, Number(*second))
