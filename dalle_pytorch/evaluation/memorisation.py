"""Whether a DALLE copies: how near its pictures are to training pictures, beside how near held-out pictures are.

Distances are exact: in 64 bits over products, chunk by chunk, and computed anew for each nearest pair.

Axes: q pictures that are looked up, t training pictures of a chunk, h held-out pictures, p prompts, m candidates of a
prompt, e features, c channels, H W pixels, _ = must equal the other argument's (an error says so).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.evaluation.checks import check_two
from dalle_pytorch.evaluation.features import Extractor
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Picture, Section, Table
from dalle_pytorch.evaluation.report import Metrics, Protocol, shown
from dalle_pytorch.generation.grid import GridRow, picture_grid

QUANTILE = 0.01
"""A drawn picture counts as near where it is nearer to the training set than so large a share of held-out ones."""
LEAST_HELD_OUT = 100
"""Held-out pictures without which that quantile has no meaning: one of them lies below it."""
TOGETHER = 256
"""Training pictures in memory at once; no number depends on it."""
ROWS = 256
"""Pictures looked up at once."""
SHOWN = 5
"""Nearest pairs on the page."""


class Nearest(NamedTuple):
    """The nearest training picture of each picture, so far."""

    distances: Float[Tensor, " q"]
    """Euclidean."""
    indices: Int[Tensor, " q"]
    """Places in the training set; among equals the first."""


def nobody(count: int) -> Nearest:
    """Before any training picture was seen: infinitely far."""
    return Nearest(torch.full((count,), torch.inf, dtype=torch.float64), torch.zeros(count, dtype=torch.long))


def nearer(found: Nearest, queries: Float[Tensor, "q e"], chunk: Float[Tensor, "t _"], first: int) -> Nearest:
    """What was found so far, or a nearer row of one more chunk. How rows are cut into chunks changes nothing.

    Args:
        found: of the chunks before.
        queries: rows to look up.
        chunk: rows to look among.
        first: how many rows came before the chunk.

    Raises:
        ValueError: no rows, unequal widths, or rows that are no numbers.
    """
    check_two(chunk, queries, least=1)
    rows, distances, indices = chunk.double(), [], []
    for part in queries.split(ROWS):
        wide = part.double()
        squares = rows.square().sum(dim=1) - 2 * wide @ rows.T  # less the part's own squares, the same along a row
        indices.append(squares.argmin(dim=1))
        distances.append((wide - rows[indices[-1]]).square().sum(dim=1).sqrt())
    distance, index = torch.cat(distances), torch.cat(indices)
    better = distance < found.distances
    return Nearest(torch.where(better, distance, found.distances), torch.where(better, index + first, found.indices))


def pixels(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
    """Pictures as rows whose Euclidean distance is the root mean square difference of their pixels."""
    rows = images.flatten(1)
    return rows / rows.shape[1] ** 0.5


def evaluate_memorisation(
    drawn: Float[Tensor, "p m c H W"],
    prompts: Sequence[str],
    held_out: Mapping[str, Float[Tensor, "h c H W"]],
    train: Callable[[range], Float[Tensor, "t c H W"]],
    count: int,
    measure: Measure,
    *,
    extractors: Sequence[Extractor] = (),
    how: Protocol,
) -> Evaluation:
    """Distances to the nearest training picture in pixels and features, beside those of held-out pictures.

    A model that does not copy is no nearer to its training set than pictures that it never saw.

    Args:
        drawn: candidates of prompts, in [0, 1].
        prompts: theirs.
        held_out: pictures that were not trained on, by name; "real", and as the image tokenizer gives them back
            ("reconstructed"), since what it smooths lies nearer to everything.
        train: reads the training pictures of these places, as training sees them without augmentation.
        count: how many of them there are.
        measure: the protocol.
        extractors: for distances between features.
        how: how the candidates were drawn.

    Raises:
        ValueError: there are no training pictures.
    """
    if not count:
        raise ValueError("there are no training pictures to look among")
    sets = {"drawn": drawn.flatten(0, 1), **held_out}
    spaces: dict[str, tuple[Extractor | None, Callable[[Tensor], Tensor]]] = {"pixel": (None, pixels)}
    spaces |= {extractor.name: (extractor, extractor) for extractor in extractors}
    queries = {name: torch.cat([space(images) for images in sets.values()]) for name, (_, space) in spaces.items()}
    found = {name: nobody(len(rows)) for name, rows in queries.items()}
    for first in range(0, count, TOGETHER):
        chunk = train(range(first, min(first + TOGETHER, count)))
        for name, (_, space) in spaces.items():
            found[name] = nearer(found[name], queries[name], space(chunk), first)
    metrics: Metrics = {}
    sections: list[Section] = []
    sizes, how = [len(images) for images in sets.values()], {**how, "train_pictures": count}
    for name, (extractor, _) in spaces.items():
        parts = zip(found[name].distances.split(sizes), found[name].indices.split(sizes), strict=True)
        of = {key: Nearest(*part) for key, part in zip(sets, parts, strict=True)}
        distances = {key: part.distances for key, part in of.items()}
        metrics |= numbers(f"nearest_train_{name}", distances, drawn.shape[1], measure, extractor, how)
        sections += [table(name, distances, metrics), pairs(name, sets, of, prompts, train)]
    return Evaluation(metrics, sections)


def numbers(
    name: str,
    distances: Mapping[str, Float[Tensor, " _"]],
    candidates: int,
    measure: Measure,
    extractor: Extractor | None,
    how: Protocol,
) -> Metrics:
    """Mean distances, and the share of drawn pictures nearer than the 1 % quantile of held-out ones.

    Args:
        name: how the numbers begin.
        distances: of "drawn" pictures and of held-out sets.
        candidates: so many drawn pictures in a row are of one prompt.
        measure: the protocol.
        extractor: of the features; None = pixels.
        how: the rest of the protocol.
    """
    unit = "rms of pixels" if extractor is None else ""
    drawn = distances["drawn"].view(-1, candidates)
    found = {name: measure.mean(drawn.mean(dim=1), unit=unit, better="neither", extractor=extractor, how=how)}
    for key, of in distances.items():
        if key == "drawn":
            continue
        same = {"train_pictures": how["train_pictures"]}
        found[f"{name}_{key}"] = measure.mean(of, unit=unit, better="neither", extractor=extractor, how=same)
        if len(of) >= LEAST_HELD_OUT:
            near = (drawn < torch.quantile(of, QUANTILE)).double().mean(dim=1)
            extra = {**how, "held_out": len(of), "quantile": QUANTILE}
            found[f"{name}_nearer_than_{key}"] = measure.mean(near, better="lower", extractor=extractor, how=extra)
    return found


def table(name: str, distances: Mapping[str, Float[Tensor, " _"]], metrics: Metrics) -> Table:
    """Quantiles of the distances, a row a set."""
    names = {"drawn": "drawn", "real": "held out", "reconstructed": "held out, through the image tokenizer"}
    shares, rows = [0.0, QUANTILE, 0.1, 0.5], []
    for key, of in distances.items():
        nearer_ones = metrics.get(f"nearest_train_{name}_nearer_than_{key}")
        share = "" if nearer_ones is None else f"{100 * nearer_ones.value:.1f} %"
        quantiles = torch.quantile(of, torch.tensor(shares, dtype=of.dtype)).tolist()
        rows.append((names[key], *(shown(value) for value in quantiles), share))
    head = ("distance to the nearest training picture", "least", "1 %", "10 %", "median", "drawn nearer than its 1 %")
    note = (
        f"A model that does not copy has about 1 % in the last column, which needs {LEAST_HELD_OUT} held-out pictures. "
        "An image tokenizer smooths, and smooth pictures lie nearer to all: the third row is the fairer one."
    )
    return Table(f"Nearest training pictures, {spelt(name)}", note, head, rows)


def spelt(name: str) -> str:
    """A space in words."""
    return "pixels (root mean square)" if name == "pixel" else f"features of {name}"


def pairs(
    name: str,
    sets: Mapping[str, Float[Tensor, "_ c H W"]],
    found: Mapping[str, Nearest],
    prompts: Sequence[str],
    train: Callable[[range], Float[Tensor, "_ c H W"]],
) -> Picture:
    """The drawn and the real held-out pictures that are nearest to the training set, over their neighbours there."""
    rows = []
    candidates = len(sets["drawn"]) // len(prompts)
    for key, title in (("drawn", "drawn"), ("real", "held out")):
        order = found[key].distances.argsort(stable=True)[:SHOWN].tolist()
        neighbours = [train(range(at, at + 1))[0] for at in found[key].indices[order].tolist()]
        labels = [prompts[i // candidates][:14] for i in order] if key == "drawn" else []
        rows.append(GridRow(title, [sets[key][i] for i in order], labels))
        apart = [f"{found[key].distances[i]:.3f}" for i in order]
        rows.append(GridRow("nearest training picture, and how far it is", neighbours, apart))
    note = (
        f"The {SHOWN} drawn pictures with the nearest training neighbours in {spelt(name)}, and the same of held-out "
        "pictures. A copy is a drawn picture that equals its neighbour where held-out ones do not."
    )
    return Picture(f"Nearest training pictures, {spelt(name)}: five pairs", note, picture_grid(rows, cell=96))
