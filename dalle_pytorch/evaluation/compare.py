"""Two evaluations side by side. Numbers that were measured in two ways are refused."""

from collections.abc import Container, Sequence

from dalle_pytorch.evaluation.report import Difference, Metric, Record, compare, read, refusals, shown


def side_by_side(first: str, second: str) -> tuple[str, str | None]:
    """The numbers that both files have and that were measured alike.

    Args:
        first: a ``metrics.json``.
        second: another.

    Returns:
        A table with a line a number, and which names are in one file only; what was left out and why, None if nothing.

    Raises:
        FileNotFoundError: no such file.
        UserError: a file that is none, or no number that can be compared.
    """
    a, b, names = read(first), read(second), (first, second)
    refused = refusals(a, b, names=names)
    if len(refused) == len(set(a.metrics) & set(b.metrics)):
        refused = {}  # compare refuses them all
    lines = [table(compare(without(a, refused), without(b, refused), names=names))]
    for path, own, other in ((first, a, b), (second, b, a)):
        if left := [name for name in own.metrics if name not in other.metrics]:
            lines.append(f"only in {path}: {', '.join(left)}")
    why = f" ({next(iter(refused.values()))}); evaluate both alike" if refused else ""
    return "\n".join(lines), f"left out, since measured in two ways: {', '.join(refused)}{why}" if refused else None


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


def without(record: Record, names: Container[str]) -> Record:
    """A record without some of its numbers."""
    return Record(record.subject, {name: metric for name, metric in record.metrics.items() if name not in names})
