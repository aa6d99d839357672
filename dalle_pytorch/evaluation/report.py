"""Numbers that say how they came about: ``metrics.json``, and which of them may be compared."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.evaluation.bootstrap import Interval
from dalle_pytorch.files import atomic

VERSION = 1
Setting: TypeAlias = str | int | float | bool | None
Protocol: TypeAlias = Mapping[str, Setting]
"""Everything that another value of the same model could depend on: data, split, sizes, sampling, blur."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number."""

    value: float
    count: int
    """Samples that it is of."""
    interval: Interval | None = None
    """Ends of its 95 % confidence interval; None where there is none."""
    protocol: Protocol
    """How it was measured."""
    extractor: str | None = None
    """The network it looks through, and how; None = pixels, tokens or likelihoods themselves."""
    weights_sha256: str | None = None
    """Of that network's weights."""
    unit: str = ""
    """"dB", "nats/token", "%", ..."""
    better: str = "higher"
    """"higher", "lower", or "neither" for what only describes."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a number that is none, no samples, an interval the wrong way round, or half an extractor.
        """
        if not math.isfinite(self.value):
            raise UserError(f"the value is {self.value}; look for NaN in the model's output")
        at_least_one(self, "count")
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval {self.interval} must have its lower end first")
        if (self.extractor is None) != (self.weights_sha256 is None):
            raise ValueError("extractor and weights_sha256 belong together: give both or none")
        if self.better not in ("higher", "lower", "neither"):
            raise ValueError(f"better must be higher, lower or neither, got {self.better!r}")


Metrics: TypeAlias = dict[str, Metric]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was judged."""

    kind: str
    """Of the checkpoint: "vae", "dalle", "clip", ..."""
    weights_sha256: str
    """Of its weights."""
    step: int | None = None
    """Optimiser steps it was trained for, where the checkpoint says."""


class Record(NamedTuple):
    """Content of a ``metrics.json``."""

    subject: Subject
    metrics: Metrics


def write(record: Record, path: str | Path) -> None:
    """Write ``metrics.json``: sorted, without times or paths, so that two runs of one command give the same bytes.

    A file that is there is replaced.
    """
    content = {
        "version": VERSION,
        "subject": asdict(record.subject),
        "metrics": {
            name: {**asdict(metric), "protocol": dict(metric.protocol)} for name, metric in record.metrics.items()
        },
    }
    with atomic(Path(path)) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read(path: str | Path) -> Record:
    """A ``metrics.json``, or that of a folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none, or of another version; names it.
    """
    path = Path(path)
    path = path / "metrics.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; evaluate.py writes it, out=FOLDER has metrics.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise UserError(f"it has version {content['version']}, this program reads {VERSION}")
        metrics = {name: _metric(entry) for name, entry in content["metrics"].items()}
        return Record(Subject(**content["subject"]), metrics)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is no metrics.json of evaluate.py: {error}") from error


def _metric(entry: dict[str, Any]) -> Metric:
    if entry["interval"] is not None:
        entry["interval"] = (entry["interval"][0], entry["interval"][1])
    return Metric(**entry)


class Difference(NamedTuple):
    """One number of two records."""

    name: str
    first: Metric
    second: Metric

    @property
    def apart(self) -> bool | None:
        """Whether the intervals do not overlap, a careful sign of a real difference; None without intervals."""
        if self.first.interval is None or self.second.interval is None:
            return None
        return self.first.interval[1] < self.second.interval[0] or self.second.interval[1] < self.first.interval[0]


def compare(first: Record, second: Record, *, names: tuple[str, str] = ("the first", "the second")) -> list[Difference]:
    """The numbers that both records have, side by side.

    Args:
        first: a record.
        second: another.
        names: what to call them in errors.

    Raises:
        ValueError: they have no number in common, or one was measured in two ways; names the field that differs.
    """
    common = [name for name in first.metrics if name in second.metrics]
    if not common:
        raise UserError(
            f"no number is in both: {names[0]} has {', '.join(first.metrics) or 'none'}; "
            f"{names[1]} has {', '.join(second.metrics) or 'none'}"
        )
    if problems := refusals(first, second, names=names):
        more = f" (and {len(problems) - 1} more numbers)" if len(problems) > 1 else ""
        problem = next(iter(problems.values()))
        raise UserError(f"measured in two ways, so not to be compared: {problem}{more}; evaluate both alike")
    return [Difference(name, first.metrics[name], second.metrics[name]) for name in common]


def refusals(first: Record, second: Record, *, names: tuple[str, str] = ("the first", "the second")) -> dict[str, str]:
    """The numbers that both records have and measured in two ways, and what differs first."""
    found = {}
    for name in first.metrics:
        if name in second.metrics and (differences := unlike(first.metrics[name], second.metrics[name])):
            field, mine, other = differences[0]
            found[name] = f"{name}: {field} is {mine!r} in {names[0]} and {other!r} in {names[1]}"
    return found


def unlike(first: Metric, second: Metric) -> list[tuple[str, Setting, Setting]]:
    """What two numbers differ in that must be equal for a comparison: the field, and both settings."""
    ways = []
    for metric in (first, second):
        own = {name: getattr(metric, name) for name in ("count", "extractor", "weights_sha256", "unit", "better")}
        ways.append({f"protocol.{key}": value for key, value in words_first(metric.protocol)} | own)
    a, b = ways
    found = [(field, a.get(field, "not given"), b.get(field, "not given")) for field in {**a, **b}]
    return [difference for difference in found if difference[1] != difference[2]]


def words_first(protocol: Protocol) -> list[tuple[str, Setting]]:
    """A protocol in order, hashes last: a reader would rather hear of another split than of another hash."""
    return sorted(protocol.items(), key=lambda item: (item[0].endswith("sha256"), item[0]))


def shown(value: float | int) -> str:
    """A number with four significant digits, without an exponent where it can be done; 100, 101, ... as they are."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3e}"
    if value == int(value) and not 0 < abs(value) < 100:
        return str(int(value))
    exponent = int(f"{value:.3e}".partition("e")[2])  # of the rounded value: 9.9999 is 10.00
    return f"{value:.{max(3 - exponent, 0)}f}"
