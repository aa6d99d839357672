"""The plot of an experiment: a panel for each number over the arms, then one for each curve, where they are wanted."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle_pytorch.files import atomic
from replication.arms import Result
from replication.experiment import ReplicateConfig

WIDTH, HEIGHT, COLUMNS = 4.2, 3.2, 3
"""Inches of a panel; panels in a row."""


def draw(config: ReplicateConfig, results: Mapping[str, Mapping[int, Result]], path: Path) -> bool:
    """Write the plot, where matplotlib is installed: every seed a dot, their mean a line or a bar.

    Returns:
        Whether there is one.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    given = {name for seeds in results.values() for result in seeds.values() for name in result.curves}
    curves = sorted(given) if config.curve_axis else []
    count = len(config.shown) + len(curves)
    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, config.shown, strict=False):
        _numbers(axis, config, results, name)
    for axis, name in zip(axes[len(config.shown) :], curves, strict=False):
        _curves(axis, config, results, name)
    for axis in axes[count:]:
        axis.remove()
    figure.suptitle(f"{config.row} {config.claim}".strip(), fontsize=10, wrap=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _numbers(axis: Any, config: ReplicateConfig, results: Mapping[str, Mapping[int, Result]], name: str) -> None:
    arms = list(results)
    scale = positions(arms)
    x = list(range(len(arms))) if scale is None else scale
    for place, seeds in zip(x, results.values(), strict=True):
        each = [result.numbers[name] for result in seeds.values() if name in result.numbers]
        axis.plot([place] * len(each), each, ".", color="tab:blue", alpha=0.6)
        if each:
            axis.plot(place, statistics.fmean(each), "_", color="black", markersize=16)
    if scale is None:
        axis.set_xticks(x, arms, rotation=20 if max(map(len, arms)) > 6 else 0, fontsize=8)
        axis.margins(x=0.15)
    else:
        if config.log_x:
            linear = min((value for value in scale if value > 0), default=1.0)
            axis.set_xscale("symlog", linthresh=linear)
        axis.set_xticks(scale, arms, fontsize=8)
        axis.minorticks_off()
    axis.set_xlabel(config.axis)
    axis.set_title(name, fontsize=10)
    axis.grid(alpha=0.3)


def _curves(axis: Any, config: ReplicateConfig, results: Mapping[str, Mapping[int, Result]], name: str) -> None:
    for index, (arm, seeds) in enumerate(results.items()):
        for number, result in enumerate(seeds.values()):
            if name in result.curves:
                curve = result.curves[name]
                label = arm if number == 0 else None
                axis.plot(curve.x, curve.y, color=f"C{index % 10}", alpha=0.8, linewidth=1.2, label=label)
    if config.log_curves:
        axis.set_xscale("log", base=2)
    axis.set_xlabel(config.curve_axis)
    axis.set_title(name, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def positions(arms: list[str]) -> list[float] | None:
    """The arms' names as numbers, also fractions like 1/16; None where one is none."""
    found = []
    for arm in arms:
        above, slash, below = arm.partition("/")
        try:
            found.append(float(above) / (float(below) if slash else 1.0))
        except (ValueError, ZeroDivisionError):
            return None
    return found
