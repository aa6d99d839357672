"""Whether a DALLE copies: how near its pictures are to training pictures, beside how near held-out pictures are.

Axes: b pictures, t training pictures, h held-out pictures, p prompts, m candidates of a prompt, c channels, H W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.features import Extractor
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.nearest import Nearest, nearer, nobody, pixels
from dalle_pytorch.evaluation.page import Gallery, Section, Table
from dalle_pytorch.evaluation.report import Metrics, Protocol, shown
from dalle_pytorch.generation.grid import GridRow

QUANTILE = 0.01
"""A drawn picture counts as near where it is nearer to the training set than all but so many of the held-out ones."""
LEAST_HELD_OUT = 100
"""Held-out pictures without which that quantile has no meaning: one of them lies below it."""
COPIES = 200
"""Training pictures, at even distances, that stand for what a model that only copies would draw."""
TOGETHER = 256
"""Training pictures in memory at once; no number depends on it."""
SHOWN = 5
"""Nearest pairs on the page."""
SETS = {
    "drawn": "drawn",
    "real": "held out",
    "reconstructed": "held out, through the image tokenizer",
    "copies": "training pictures, through the image tokenizer",
}
HELD_OUT = ("real", "reconstructed")
Train: TypeAlias = Callable[[Sequence[int]], Float[Tensor, "t c H W"]]
"""Reads the training pictures of these places, without augmentation."""


class Space(NamedTuple):
    """Where distances are measured."""

    name: str
    """In the names of numbers: "pixel", "decoded_pixel", "clip", "decoded_clip"."""
    words: str
    extractor: Extractor | None
    """None = pixels."""
    decoded: bool
    """Training pictures pass through the image tokenizer too: a copy, token by token, has distance 0 then."""

    def rows(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Features of pictures."""
        return pixels(images) if self.extractor is None else self.extractor(images)

    def sets(self) -> tuple[str, ...]:
        """Which of ``SETS`` are looked up: through the tokenizer only what has been through it, and copies are at 0."""
        return ("drawn", "reconstructed") if self.decoded else tuple(SETS)


def spaces_of(extractors: Sequence[Extractor]) -> list[Space]:
    """Pixels and every extractor's features, with training pictures as they are and through the image tokenizer."""
    found = []
    for name, words, extractor in [
        ("pixel", "pixels", None),
        *((extractor.name, f"features of {extractor.name}", extractor) for extractor in extractors),
    ]:
        found.append(Space(f"decoded_{name}", f"{words}, through the tokenizer", extractor, True))
        found.append(Space(name, words, extractor, False))
    return found


def evaluate_memorisation(
    drawn: Float[Tensor, "p m c H W"],
    prompts: Sequence[str],
    held_out: Float[Tensor, "h c H W"],
    train: Train,
    count: int,
    reconstruct: Callable[[Tensor], Tensor],
    measure: Measure,
    *,
    extractors: Sequence[Extractor] = (),
    how: Protocol,
    trained: Protocol = MappingProxyType({}),
) -> Evaluation:
    """Distances to the nearest training picture in pixels and features, beside those of held-out pictures.

    A model that does not copy is no nearer to its training set than pictures that it never saw. What an image tokenizer
    smooths lies nearer to everything, so that held-out pictures are looked up as they are and as it gives them back.

    Args:
        drawn: candidates of prompts, in [0, 1].
        prompts: theirs.
        held_out: pictures that were not trained on.
        train: reads training pictures.
        count: how many of them there are.
        reconstruct: pictures as the model's image tokenizer gives them back.
        measure: the protocol.
        extractors: for distances between features.
        how: how the candidates were drawn.
        trained: which pictures the training ones are.

    Raises:
        ValueError: there are no training pictures.
    """
    if not count:
        raise UserError("there are no training pictures to look among")
    copied = reconstruct(train(range(0, count, max(1, count // COPIES))[:COPIES]))
    sets = {"drawn": drawn.flatten(0, 1), "real": held_out, "reconstructed": reconstruct(held_out), "copies": copied}
    spaces = spaces_of(extractors)
    found = look_up(sets, spaces, train, count, reconstruct)
    metrics: Metrics = {}
    sections: list[Section] = []
    for space in spaces:
        of = found[space.name]
        distances = {name: part.distances for name, part in of.items()}
        metrics |= numbers(space, distances, len(prompts), measure, how, {**trained, "train_pictures": count})
        pictures: Train = (lambda places: reconstruct(train(places))) if space.decoded else train
        sections += [table(space, distances), pairs(space, sets, of, prompts, pictures)]
    return Evaluation(metrics, sections)


def look_up(
    sets: Mapping[str, Float[Tensor, "_ c H W"]],
    spaces: Sequence[Space],
    train: Train,
    count: int,
    reconstruct: Callable[[Tensor], Tensor],
) -> dict[str, dict[str, Nearest]]:
    """The nearest training pictures, by space and set; training pictures are read once, in chunks."""
    rows = {space.name: {name: space.rows(sets[name]) for name in space.sets()} for space in spaces}
    found = {space: {name: nobody(len(part)) for name, part in of.items()} for space, of in rows.items()}
    for first in range(0, count, TOGETHER):
        chunk = train(range(first, min(first + TOGETHER, count)))
        decoded = reconstruct(chunk)
        for space in spaces:
            among, of = space.rows(decoded if space.decoded else chunk), found[space.name]
            of.update({name: nearer(of[name], part, among, first) for name, part in rows[space.name].items()})
    return found


def numbers(
    space: Space,
    distances: Mapping[str, Float[Tensor, " _"]],
    prompts: int,
    measure: Measure,
    how: Protocol,
    trained: Protocol,
) -> Metrics:
    """Mean distances, and the shares of drawn pictures and of copies nearer than the 1 % quantile of held-out ones.

    Args:
        space: where they were measured.
        distances: of the sets, by name.
        prompts: of how many prompts the drawn pictures are, in equal parts.
        measure: the protocol of all.
        how: how the candidates were drawn.
        trained: which pictures the training ones are.
    """
    name, seen = f"nearest_train_{space.name}", space.extractor
    values = dict(distances)
    values["drawn"] = values["drawn"].view(prompts, -1)
    unit = "rms of pixels" if seen is None else ""
    found = {}
    for key, of in values.items():
        used = {**trained, **(how if key == "drawn" else {})}
        mean = measure.mean(of.view(len(of), -1).mean(dim=1), unit=unit, better="neither", extractor=seen, how=used)
        found[name if key == "drawn" else f"{name}_{key}"] = mean
    for other in HELD_OUT:
        if other not in values or len(values[other]) < LEAST_HELD_OUT:
            continue
        for key, better in (("drawn", "lower"), ("copies", "neither")):
            if key in values:
                of = values[key]
                near = below(of, values[other]).view(len(of), -1).mean(dim=1)
                used = {**trained, **(how if key == "drawn" else {}), "held_out": len(values[other])}
                used["quantile"] = QUANTILE
                end = f"{'' if key == 'drawn' else '_copies'}_nearer_than_{other}"
                found[f"{name}{end}"] = measure.mean(near, better=better, extractor=seen, how=used)
    return found


def below(of: Float[Tensor, "..."], held_out: Float[Tensor, " h"]) -> Float[Tensor, "..."]:
    """1 for each distance below the 1 % quantile of those of held-out pictures, else 0."""
    return (of < torch.quantile(held_out, QUANTILE)).double()


def table(space: Space, distances: Mapping[str, Float[Tensor, " _"]]) -> Table:
    """Quantiles of the distances and shares below the 1 % quantiles of held-out pictures, a row a set."""
    shares, limits = [0.0, QUANTILE, 0.1, 0.5], [name for name in HELD_OUT if name in distances]
    rows = []
    for name, of in distances.items():
        quantiles = torch.quantile(of, torch.tensor(shares, dtype=of.dtype)).tolist()
        columns = [
            f"{100 * below(of, distances[other]).mean().item():.1f} %"
            if name not in HELD_OUT and len(distances[other]) >= LEAST_HELD_OUT
            else ""
            for other in limits
        ]
        rows.append((SETS[name], *(shown(value) for value in quantiles), *columns))
    head = ("", "least", "1 %", "10 %", "median", *(f"nearer than the 1 % of: {SETS[other]}" for other in limits))
    note = (
        "Quantiles of the distance to the nearest training picture. A model that does not copy has about 1 % in the "
        f"last columns (which need {LEAST_HELD_OUT} held-out pictures). "
    )
    if space.decoded:
        note += "Training pictures too are as the tokenizer gives them back: one copied token by token has distance 0."
    else:
        note += "A model that only copies has what the last row has: where that is little, the test sees little."
    return Table(f"Nearest training pictures: {space.words}", note, head, rows)


def pairs(
    space: Space,
    sets: Mapping[str, Float[Tensor, "_ c H W"]],
    found: Mapping[str, Nearest],
    prompts: Sequence[str],
    train: Train,
) -> Gallery:
    """The drawn and the held-out pictures that are nearest to the training set, over their neighbours there."""
    rows, candidates = [], len(sets["drawn"]) // len(prompts)
    for key in ("drawn", "reconstructed" if space.decoded else "real"):
        order = found[key].distances.argsort(stable=True)[:SHOWN].tolist()
        neighbours = list(train(found[key].indices[order].tolist()))
        labels = [prompts[i // candidates] for i in order] if key == "drawn" else []
        rows.append(GridRow(SETS[key], [sets[key][i] for i in order], labels))
        apart = [f"{found[key].distances[i]:.3f}" for i in order]
        rows.append(GridRow("nearest training picture, and how far it is", neighbours, apart))
    note = (
        f"The {SHOWN} drawn pictures with the nearest training neighbours, and the same of held-out pictures. A copy "
        "is a drawn picture that equals its neighbour where held-out ones do not."
    )
    return Gallery(f"Nearest pairs: {space.words}", note, rows)
