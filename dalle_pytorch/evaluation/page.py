"""``report.html``: one file with numbers, pictures and plots, to be opened in any browser or sent to a colleague."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dalle_pytorch.checkpoint import atomic
from dalle_pytorch.evaluation.report import Metric, Record, shown
from dalle_pytorch.evaluation.scatter import Scatter, draw_scatter

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .6rem 0 } th, td { text-align: left; padding: .25rem .9rem .25rem 0 }
td, th { border-bottom: 1px solid #ddd; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; border: 1px solid #ddd } code { font-size: .88em } .note { color: #666; max-width: 46rem }
details { margin: .4rem 0 } summary { cursor: pointer; color: #555 } .scroll { overflow-x: auto }
"""


class Line(NamedTuple):
    """A named row of points of a plot, equal in number to its ``x``."""

    name: str
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower ends of a band, with ``high``."""
    high: Sequence[float] | None = None


class Plot(NamedTuple):
    """Lines over a common axis; drawn where matplotlib is installed, always given as a table."""

    title: str
    note: str
    x_name: str
    y_name: str
    x: Sequence[float]
    lines: Sequence[Line]
    log_x: bool = False


class Picture(NamedTuple):
    """A picture with a heading and a line that says what to see."""

    title: str
    note: str
    image: Image.Image


class Table(NamedTuple):
    """Rows of text under a heading."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


Section = Plot | Picture | Table | Scatter


def write(record: Record, sections: Sequence[Section], path: str | Path, *, title: str) -> None:
    """Write the page: every number first, then the sections. Nothing in it is loaded from elsewhere.

    A file that is there is replaced.
    """
    subject = record.subject
    steps = "" if subject.step is None else f", {subject.step} steps"
    head = f"{subject.kind}{steps}, weights <code>{html.escape(subject.weights_sha256[:12])}</code>"
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{head}</p>", numbers(record), *map(section, sections)]
    text = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    with atomic(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def numbers(record: Record) -> str:
    """The table of numbers, and how each was measured."""
    rows, ways = [], []
    for name, metric in record.metrics.items():
        arrow = {"higher": "↑", "lower": "↓", "neither": ""}[metric.better]
        interval = "" if metric.interval is None else f"{shown(metric.interval[0])} to {shown(metric.interval[1])}"
        rows.append((f"{name} {arrow}", f"{shown(metric.value)} {metric.unit}", interval, str(metric.count)))
        ways.append((name, way(metric)))
    note = "↑ higher is better, ↓ lower is better. Intervals hold 95 %: of samples drawn again, not of trainings."
    shown_rows = table_html(("number", "value", "95 % interval", "samples"), rows, numeric=(1, 2, 3))
    details = table_html(("number", "protocol"), ways)
    return (
        f'<h2>Numbers</h2><p class="note">{note}</p>{shown_rows}'
        f"<details><summary>how each was measured</summary>{details}</details>"
    )


def way(metric: Metric) -> str:
    """The protocol of a number in a line."""
    parts = [f"{key} = {value}" for key, value in sorted(metric.protocol.items())]
    if metric.extractor is not None:
        parts.append(f"through {metric.extractor}, weights {str(metric.weights_sha256)[:12]}")
    return "; ".join(parts)


def section(part: Section) -> str:
    """One section as HTML."""
    head = f'<h2>{html.escape(part.title)}</h2><p class="note">{html.escape(part.note)}</p>'
    if isinstance(part, Picture):
        return head + image_html(png(part.image), part.title)
    if isinstance(part, Table):
        return head + table_html(part.head, part.rows)
    if isinstance(part, Scatter):
        points = [(p.name, shown(p.x), shown(p.y), part.marks if p.marked else "") for p in part.points]
        values, drawn = table_html(("", part.x_name, part.y_name, ""), points, numeric=(1, 2)), draw_scatter(part)
    else:
        columns = [part.x_name, *[line.name for line in part.lines]]
        rows = [(shown(x), *[shown(line.y[i]) for line in part.lines]) for i, x in enumerate(part.x)]
        values, drawn = table_html(columns, rows, numeric=range(len(columns))), draw(part)
    if drawn is None:
        return head + values
    return head + image_html(drawn, part.title) + f"<details><summary>as a table</summary>{values}</details>"


def draw(plot: Plot) -> bytes | None:
    """The plot as a PNG; None without matplotlib (``pip install matplotlib``)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for line in plot.lines:
        (drawn,) = axes.plot(plot.x, line.y, marker="o", markersize=3, label=line.name)
        if line.low is not None and line.high is not None:
            axes.fill_between(plot.x, line.low, line.high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    if plot.log_x:
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(plot.x), [f"{x:g}" for x in plot.x])
    axes.set(xlabel=plot.x_name, ylabel=plot.y_name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """A picture's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def image_html(data: bytes, title: str) -> str:
    """A picture inside the page."""
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()) -> str:
    """Rows of text; those in ``numeric`` columns stand to the right."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = [
        "".join(
            f"<td{' class=n' if column in numeric else ''}>{html.escape(cell)}</td>" for column, cell in enumerate(row)
        )
        for row in rows
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
