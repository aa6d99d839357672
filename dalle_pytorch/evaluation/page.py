"""``report.html``: one file with numbers, pictures and plots, to be opened in any browser or sent to a colleague."""

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from dalle_pytorch.evaluation.report import Metric, Protocol, Record, shown
from dalle_pytorch.evaluation.scatter import Scatter, draw_scatter
from dalle_pytorch.evaluation.style import STYLE
from dalle_pytorch.evaluation.topics import ASIDE, grouped, headlines, words
from dalle_pytorch.files import atomic
from dalle_pytorch.generation.grid import GridRow, picture_grid, save_png
from dalle_pytorch.images import to_pil

SIDE = 128
"""Pixels of the page that a picture of a gallery is wide; smaller ones are enlarged by a whole factor to about this."""


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


class Gallery(NamedTuple):
    """Headed rows of small pictures, each with a line under it; they stand in columns."""

    title: str
    note: str
    rows: Sequence[GridRow]


class Table(NamedTuple):
    """Rows of text under a heading."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


Section = Plot | Scatter | Picture | Gallery | Table


def write(record: Record, sections: Sequence[Section], path: str | Path, *, title: str) -> None:
    """Write the page: headlines, the sections, then every number by topic. Nothing in it is loaded from elsewhere.

    A file that is there is replaced.
    """
    links = [f'<a href="#part{i}">{html.escape(part.title)}</a>' for i, part in enumerate(sections)]
    links.append('<a href="#numbers">All numbers</a>')
    parts = [f'<section id="part{i}">{section(part)}</section>' for i, part in enumerate(sections)]
    body = [
        f'<h1>{html.escape(title)}</h1><p class="facts">{facts(record)}</p>',
        cards(record),
        f"<nav>{' '.join(links)}</nav>",
        *parts,
        f'<section id="numbers">{numbers(record)}</section>',
    ]
    text = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    with atomic(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_galleries(sections: Sequence[Section], folder: Path, settings: dict[str, Any]) -> None:
    """Write every gallery as a PNG too, named after its title, for model cards and papers.

    Args:
        sections: of the page.
        folder: made if there are galleries.
        settings: kept in each PNG's text field.

    Raises:
        FileExistsError: such a file is there already.
    """
    for part in sections:
        if isinstance(part, Gallery):
            folder.mkdir(exist_ok=True)
            name = re.sub(r"[^a-z0-9]+", "_", part.title.lower()).strip("_")
            width = part.rows[0].images[0].shape[-1]
            grid = picture_grid(part.rows, cell=width * enlarged(width))
            save_png(grid, folder / f"{name}.png", settings)


def enlarged(width: int) -> int:
    """The whole factor by which a picture of so many pixels is shown."""
    return max(1, round(SIDE / width))


def facts(record: Record) -> str:
    """What was judged, on what."""
    subject, same = record.subject, common(record)
    steps = "" if subject.step is None else f", {subject.step} steps"
    told = [f"{subject.kind}{steps}, weights <code>{html.escape(subject.weights_sha256[:12])}</code>"]
    if "pictures" in same:
        told.append(html.escape(f"pictures: {same['pictures']}"))
    if "image_size" in same:
        told.append(html.escape(f"{same['image_size']} pixels wide"))
    return " · ".join(told)


def common(record: Record) -> Protocol:
    """The settings that all numbers share."""
    first, *rest = [metric.protocol for metric in record.metrics.values()] or [{}]
    return {key: value for key, value in first.items() if all(key in p and p[key] == value for p in rest)}


def cards(record: Record) -> str:
    """The few numbers to read first."""
    found = []
    for name in headlines(record.metrics):
        metric, unit = record.metrics[name], html.escape(record.metrics[name].unit)
        lines = [] if metric.interval is None else [f"95 %: {interval(metric)}"]
        beside = {text: record.metrics.get(name + ending) for ending, text in ASIDE.items()}
        lines += [f"{text}: {shown(other.value)}" for text, other in beside.items() if other is not None]
        found.append(
            f'<div class="card">{code(name)} {arrow(metric)}<b>{shown(metric.value)} <small>{unit}</small></b>'
            f"<small>{html.escape(words(name))}{''.join(f'<br>{html.escape(line)}' for line in lines)}</small></div>"
        )
    return f'<div class="cards">{"".join(found)}</div>' if found else ""


def code(name: str) -> str:
    """The name of a number, which may break after an underscore."""
    return f"<code>{html.escape(name).replace('_', '_<wbr>')}</code>"


def arrow(metric: Metric) -> str:
    """Which way is better."""
    return {"higher": "↑", "lower": "↓", "neither": ""}[metric.better]


def interval(metric: Metric) -> str:
    """Both ends."""
    return "" if metric.interval is None else f"{shown(metric.interval[0])} to {shown(metric.interval[1])}"


def numbers(record: Record) -> str:
    """Every number by topic, and how each was measured."""
    note = (
        "↑ higher is better, ↓ lower is better. Intervals hold 95 %: of samples drawn again, not of trainings. "
        "Samples are what a number is of: pictures, captions or prompts."
    )
    parts = [f'<h2>All numbers</h2><p class="note">{note}</p>']
    for topic, names in grouped(record.metrics):
        values = number_table([(name, record.metrics[name]) for name in names])
        about = f'<p class="note">{html.escape(topic.note)}</p>' if topic.note else ""
        if topic.folded:
            parts.append(f"<details><summary>{html.escape(topic.title)}: {len(names)} numbers</summary>{about}{values}")
            parts.append("</details>")
        else:
            parts.append(f"<h3>{html.escape(topic.title)}</h3>{about}{values}")
    same = common(record)
    ways = [(name, own) for name, metric in record.metrics.items() if (own := way(metric, same))]
    shared = "; ".join(f"{key} = {value}" for key, value in sorted(same.items()))
    parts.append(
        "<details><summary>How each was measured</summary>"
        f'<p class="way">All: {html.escape(shared)}</p>'
        f'<div class="way">{table_html(("number", "and its own"), ways)}</div></details>'
    )
    return "\n".join(parts)


def number_table(metrics: Sequence[tuple[str, Metric]]) -> str:
    """A row a number: its name and what it is, value, interval, count of samples."""
    rows = []
    for name, metric in metrics:
        told = f"<small>{html.escape(words(name))}</small>"
        value = f"{shown(metric.value)} <small>{html.escape(metric.unit)}</small>"
        cells = (value, interval(metric), str(metric.count))
        rows.append(
            f"<tr><td>{code(name)} {arrow(metric)}{told}</td>"
            + "".join(f'<td class="n">{cell}</td>' for cell in cells)
            + "</tr>"
        )
    head = '<tr><th>number</th><th class="n">value</th><th class="n">95 % interval</th><th class="n">samples</th></tr>'
    return f'<div class="scroll"><table class="numbers">{head}{"".join(rows)}</table></div>'


def way(metric: Metric, same: Protocol) -> str:
    """The protocol of a number in a line, without what all share."""
    parts = [f"{key} = {value}" for key, value in sorted(metric.protocol.items()) if key not in same]
    if metric.extractor is not None:
        parts.append(f"through {metric.extractor}, weights {str(metric.weights_sha256)[:12]}")
    return "; ".join(parts)


def section(part: Section) -> str:
    """One section as HTML."""
    head = f'<h2>{html.escape(part.title)}</h2><p class="note">{html.escape(part.note)}</p>'
    if isinstance(part, Picture):
        return head + image_html(png(part.image), part.title, style="frame")
    if isinstance(part, Gallery):
        return head + gallery_html(part)
    if isinstance(part, Table):
        return head + table_html(part.head, part.rows, numeric=number_columns(part.rows))
    if isinstance(part, Scatter):
        points = [(p.name, shown(p.x), shown(p.y), part.marks if p.marked else "") for p in part.points]
        values, drawn = table_html(("", part.x_name, part.y_name, ""), points, numeric=(1, 2)), draw_scatter(part)
    else:
        columns = [part.x_name, *[line.name for line in part.lines]]
        rows = [(f"{x:g}", *[shown(line.y[i]) for line in part.lines]) for i, x in enumerate(part.x)]
        values, drawn = table_html(columns, rows, numeric=range(len(columns))), draw(part)
    if drawn is None:
        return head + values
    picture = image_html(drawn, part.title, style="plot", kind="svg+xml")
    return f"{head}{picture}<details><summary>As a table</summary>{values}</details>"


def draw(plot: Plot) -> bytes | None:
    """The plot as an SVG, the same for the same numbers; None without matplotlib (``pip install matplotlib``)."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return None
    with rc_context({"svg.hashsalt": "report", "font.size": 10}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for number, line in enumerate(plot.lines):
            (drawn,) = axes.plot(plot.x, line.y, "--" if number else "o-", markersize=4, label=line.name)
            if line.low is not None and line.high is not None:
                axes.fill_between(plot.x, line.low, line.high, color=drawn.get_color(), alpha=0.15, linewidth=0)
        if plot.log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(plot.x), [f"{x:g}" for x in plot.x])
        axes.set(xlabel=plot.x_name, ylabel=plot.y_name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def gallery_html(gallery: Gallery) -> str:
    """Rows of pictures in their own pixels, so that the browser may draw them sharp at any size."""
    columns = max(len(row.images) for row in gallery.rows)
    width = gallery.rows[0].images[0].shape[-1]
    factor = enlarged(width)
    style, side = ("row small", factor * width) if factor > 1 else ("row", min(width, SIDE))
    found = []
    for row in gallery.rows:
        figures = []
        for place, image in enumerate(row.images):
            label = row.labels[place] if row.labels else ""
            told = f"<figcaption>{html.escape(label)}</figcaption>" if label else ""
            figures.append(f"<figure>{image_html(png(to_pil(image)), f'{row.title} {label}'.strip())}{told}</figure>")
        found.append(f"<h4>{html.escape(row.title)}</h4>")
        found.append(f'<div class="{style}" style="--n:{columns};--w:{side}px">{"".join(figures)}</div>')
    return "".join(found)


def png(image: Image.Image) -> bytes:
    """A picture's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def image_html(data: bytes, title: str, *, style: str = "", kind: str = "png") -> str:
    """A picture inside the page."""
    named = f' class="{style}"' if style else ""
    return f'<img{named} alt="{html.escape(title)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def number_columns(rows: Sequence[Sequence[str]]) -> list[int]:
    """Columns with nothing but numbers."""

    def is_number(cell: str) -> bool:
        try:
            float(cell or "0")
        except ValueError:
            return False
        return True

    return [i for i, column in enumerate(zip(*rows, strict=True)) if all(map(is_number, column))]


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int] = ()) -> str:
    """Rows of text; those in ``numeric`` columns stand to the right."""
    marks = [' class="n"' if column in numeric else "" for column in range(len(head))]
    top = "".join(f"<th{mark}>{html.escape(cell)}</th>" for mark, cell in zip(marks, head, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{mark}>{html.escape(cell)}</td>' for mark, cell in zip(marks, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'
