"""Points of two numbers each, of which some are marked and named: what the page draws of a trade-off."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from dalle_pytorch.evaluation.bootstrap import Interval


class Point(NamedTuple):
    """One way of doing it."""

    name: str
    x: float
    y: float
    marked: bool = False
    """Drawn in colour and named; the others are grey."""
    x_ends: Interval | None = None
    """Interval of ``x``, drawn as a thin line."""
    y_ends: Interval | None = None


class Scatter(NamedTuple):
    """Points over two axes; drawn where matplotlib is installed, always given as a table."""

    title: str
    note: str
    x_name: str
    y_name: str
    points: Sequence[Point]
    marks: str
    """What the marked points are, for legend and table."""


def draw_scatter(scatter: Scatter) -> bytes | None:
    """The points as a PNG, a line through the marked ones; None without matplotlib (``pip install matplotlib``)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for marked, colour in ((False, "#999999"), (True, "tab:blue")):
        group = sorted((point for point in scatter.points if point.marked == marked), key=lambda point: point.x)
        for point in group:
            for ends, draw in ((point.x_ends, axes.hlines), (point.y_ends, axes.vlines)):
                if ends is not None:
                    draw(point.y if ends is point.x_ends else point.x, *ends, color=colour, alpha=0.35, linewidth=0.8)
        label = scatter.marks if marked else "others"
        style = {"linestyle": "-" if marked else "", "linewidth": 0.8, "marker": "o", "markersize": 5}
        if group:
            axes.plot([p.x for p in group], [p.y for p in group], color=colour, label=label, **style)
    marked_points = sorted((point for point in scatter.points if point.marked), key=lambda point: point.x)
    for number, point in enumerate(marked_points):  # above and below in turn, so that neighbours do not overlap
        up = number % 2 == 0
        place = {"xytext": (0, 9 if up else -9), "va": "bottom" if up else "top", "ha": "center"}
        axes.annotate(point.name, (point.x, point.y), textcoords="offset points", fontsize=8, **place)
    axes.margins(x=0.15, y=0.15)
    axes.set(xlabel=scatter.x_name, ylabel=scatter.y_name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
