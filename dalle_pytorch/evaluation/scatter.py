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
    """Drawn in colour, numbered and named; the others are grey."""
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
    """The points as an SVG, a line through the marked ones; None without matplotlib (``pip install matplotlib``)."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return None
    marked = sorted((point for point in scatter.points if point.marked), key=lambda point: point.x)
    with rc_context({"svg.hashsalt": "report", "font.size": 10}):
        figure = Figure(figsize=(6, 3.9 + 0.2 * len(marked)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for point in scatter.points:
            colour = "tab:blue" if point.marked else "#999999"
            style = {"color": colour, "alpha": 0.35, "linewidth": 0.8}
            if point.x_ends is not None:
                axes.hlines(point.y, *point.x_ends, **style)
            if point.y_ends is not None:
                axes.vlines(point.x, *point.y_ends, **style)
            if not point.marked:
                axes.plot(point.x, point.y, "o", color=colour, markersize=5)
        axes.plot([point.x for point in marked], [point.y for point in marked], color="tab:blue", linewidth=0.8)
        for number, point in enumerate(marked, 1):  # names are long: beside the points stand their numbers
            axes.plot(point.x, point.y, "o", color="tab:blue", markersize=5, label=f"{number}   {point.name}")
            axes.annotate(str(number), (point.x, point.y), textcoords="offset points", xytext=(5, 4), weight="bold")
        axes.set(xlabel=scatter.x_name, ylabel=scatter.y_name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        figure.legend(loc="outside lower left", frameon=False, fontsize=9, title=scatter.marks, alignment="left")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
