"""Two evaluations side by side: ``python -m dalle_pytorch.evaluation.compare a/metrics.json b/metrics.json``.

``evaluate.py compare a/metrics.json b/metrics.json`` does the same. Numbers that were measured in two ways are refused.
"""

import sys
from collections.abc import Container, Sequence

from dalle_pytorch.evaluation.report import Difference, Metric, Record, compare, read, refusals, shown

USAGE = "usage: evaluate.py compare A/metrics.json B/metrics.json"


def table(differences: Sequence[Difference]) -> str:
    """A line a number: both values with their intervals, which is better, and whether the intervals part."""
    rows = [("metric", "first", "second", "difference", "samples", "")]
    for name, a, b in differences:
        change = b.value - a.value
        rows.append(
            (name, with_interval(a), with_interval(b), f"{'+' * (change >= 0)}{shown(change)}", str(a.count), "")
        )
    verdicts = [verdict(difference) for difference in differences]
    rows = [rows[0], *[(*row[:-1], said) for row, said in zip(rows[1:], verdicts, strict=True)]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def with_interval(metric: Metric) -> str:
    """A value, its interval and its unit."""
    ends = "" if metric.interval is None else f" [{shown(metric.interval[0])}, {shown(metric.interval[1])}]"
    return f"{shown(metric.value)}{ends} {metric.unit}".rstrip()


def verdict(difference: Difference) -> str:
    """Which is better, as far as the intervals tell."""
    _, a, b = difference
    if a.value == b.value:
        return "equal"
    if a.better == "neither":
        return ""
    better = "second better" if (b.value > a.value) == (a.better == "higher") else "first better"
    said = {None: "no interval", True: "intervals part", False: "intervals overlap"}
    return f"{better}, {said[difference.apart]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the numbers that were measured alike, and refuse the others.

    Returns:
        Exit code: 0; 1 where a number cannot be compared; 2 for a wrong call.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or any(argument.startswith("-") for argument in arguments):
        print(USAGE, file=sys.stderr)
        return 2
    try:
        first, second = read(arguments[0]), read(arguments[1])
        names = (arguments[0], arguments[1])
        refused = refusals(first, second, names=names)
        if len(refused) < len(set(first.metrics) & set(second.metrics)):
            differences = compare(without(first, refused), without(second, refused), names=names)
        else:
            differences = compare(first, second, names=names)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(differences))
    for path, own, other in ((arguments[0], first, second), (arguments[1], second, first)):
        if left := [name for name in own.metrics if name not in other.metrics]:
            print(f"only in {path}: {', '.join(left)}")
    if refused:
        first_problem = next(iter(refused.values()))
        print(
            f"error: left out, since measured in two ways: {', '.join(refused)} ({first_problem}); evaluate both alike",
            file=sys.stderr,
        )
    return int(bool(refused))


def without(record: Record, names: Container[str]) -> Record:
    """A record without some of its numbers."""
    return Record(record.subject, {name: metric for name, metric in record.metrics.items() if name not in names})


if __name__ == "__main__":
    sys.exit(main())
