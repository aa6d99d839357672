"""What a probe sees in pictures: how good it is itself, and whether drawn pictures show what their captions ask for.

Axes: b pictures, p prompts, m candidates of a prompt, q other prompts, f factors, k values, c channels, H W pixels.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.data.factors import Factors
from dalle_pytorch.evaluation.dalle import curve_plot
from dalle_pytorch.evaluation.features import TOGETHER, probe_extractor
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Section, Table
from dalle_pytorch.evaluation.report import Metric, Metrics, Protocol, shown
from dalle_pytorch.evaluation.retrieval import best_of_n, recall_at, retrieval_ranks
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.probe import UNKNOWN, Probe

TOPS = (1, 5)
ALL = "all"
"""Stands in names for all factors at once."""


class Words(NamedTuple):
    """How numbers and their table are called."""

    name: str
    """First word of the metrics' names."""
    title: str
    note: str
    columns: tuple[str, str, str]
    """Of the table: what is counted, the pictures to judge, the real ones."""


DRAWN = Words(
    "follows",
    "Caption following",
    "Share of drawn pictures in which the probe sees what the caption asks for; with prompts exchanged at random; and "
    "of the real pictures, which is as much as the probe can see. Captions that do not tell a factor, or tell a value "
    "that the probe does not know, do not count.",
    ("prompts", "drawn", "real"),
)
KEPT = Words(
    "kept",
    "What a probe still sees",
    "Share of reconstructions in which the probe sees what the picture shows; with pictures exchanged at random; and "
    "of the originals. What the probe does not know does not count.",
    ("pictures", "reconstructed", "original"),
)


class Group(NamedTuple):
    """A factor, or all together, and the prompts that count for it."""

    name: str
    columns: Int[Tensor, " f"]
    rows: Int[Tensor, " p"]
    classes: int


def evaluate_probe(
    probe: Probe, images: Float[Tensor, "b c H W"], factors: Sequence[Factors], measure: Measure
) -> Evaluation:
    """Top-1 and top-5 accuracy of each factor, on pictures whose value the probe knows.

    Args:
        probe: the probe.
        images: pictures that it was not trained on, in [0, 1].
        factors: what each of them shows.
        measure: the protocol.
    """
    metrics: Metrics = {}
    rows = []
    labels = probe.labels(factors)
    for column, (name, scores) in enumerate(all_logits(probe, images).items()):
        known = labels[:, column] != UNKNOWN
        own, classes = labels[known, column], scores.shape[1]
        if len(own) < 2:
            continue
        ranks = retrieval_ranks(scores[known], own[:, None] == torch.arange(classes))
        cells = []
        for k in TOPS:
            key = f"accuracy_{name}" if k == 1 else f"accuracy_{name}_top{k}"
            if classes > k:
                metrics[key] = measure.mean(recall_at(ranks, k, classes), how={"classes": classes})
            cells.append(shown(metrics[key].value) if key in metrics else "")
        commonest = own.bincount().max().item() / len(own)
        rows.append((name, *cells, shown(commonest), str(classes), f"{len(own)} of {len(images)}"))
    head = ("", *(f"top {k}" for k in TOPS), "commonest value", "values", "pictures")
    note = "Share of pictures whose value is the probe's first guess, or among its first five."
    return Evaluation(metrics, [Table("Accuracy", note, head, rows)])


def evaluate_following(
    probe: Probe,
    images: Float[Tensor, "p m c H W"],
    asked: Sequence[Factors],
    own: Float[Tensor, "p c H W"],
    measure: Measure,
    *,
    ranks: Float[Tensor, "p m"] | None = None,
    words: Words = DRAWN,
    how: Protocol = MappingProxyType({}),
) -> Evaluation:
    """Whether pictures show what is asked of them, factor by factor, and all that is asked at once.

    Beside each number two others: with the prompts exchanged at random (the expectation over all exchanges, so chance
    for these pictures), and of the real pictures, the ceiling. A factor that fewer than two prompts ask for is left
    out.

    Args:
        probe: what looks.
        images: candidates of prompts, in [0, 1].
        asked: what each prompt asks for.
        own: the real picture of each prompt.
        measure: the protocol.
        ranks: scores of a ranker, for the best of N.
        words: what to call it.
        how: how the candidates were drawn.
    """
    labels, count = probe.labels(asked), images.shape[1]
    drawn_values = guesses(probe, images.flatten(0, 1)).view(len(images), count, -1)
    real_values = guesses(probe, own)[:, None]
    extractor = probe_extractor(probe)
    metrics: Metrics = {}
    sections: list[Section] = []
    rows = []
    for group in groups(probe, labels, asked):
        key, told = f"{words.name}_{group.name}", labels[group.rows][:, group.columns]
        fits = matches(drawn_values[group.rows][:, :, group.columns], told)
        hits = fits.diagonal(dim1=0, dim2=2).T.double()
        others = (fits.sum(dim=(1, 2)) - hits.sum(dim=1)) / (count * (len(told) - 1))
        real = matches(real_values[group.rows][:, :, group.columns], told)[:, 0].diagonal().double()
        drawn_how: Protocol = {**how, "classes": group.classes}

        def mean(values: Tensor, better: str, how: Protocol) -> Metric:
            return measure.mean(values, better=better, extractor=extractor, how=how)

        metrics[key] = mean(hits.mean(dim=1), "higher", drawn_how)
        metrics[f"{key}_shuffled"] = mean(others, "neither", drawn_how)
        metrics[f"{key}_real"] = mean(real, "neither", {"classes": group.classes})
        cells = (shown(metrics[name].value) for name in (key, f"{key}_shuffled", f"{key}_real"))
        rows.append((group.name, *cells, str(group.classes), f"{len(told)} of {len(asked)}"))
        if ranks is not None:
            sizes = [2**power for power in range(count.bit_length()) if 2**power <= count]
            curve = best_of_n(ranks[group.rows], hits, sizes)
            points = [mean(curve[:, i], "higher", {**drawn_how, "best_of": size}) for i, size in enumerate(sizes)]
            metrics |= {f"{key}_best_of_{size}": point for size, point in zip(sizes, points, strict=True)}
            title = f"Right {group.name} seen" if group.name != ALL else "All factors seen right"
            sections.append(curve_plot(title, sizes, points, metrics[f"{key}_real"], "a probe"))
    head = ("", words.columns[1], "exchanged", words.columns[2], "values", words.columns[0])
    return Evaluation(metrics, [Table(words.title, words.note, head, rows), *sections])


def groups(probe: Probe, labels: Int[Tensor, "p f"], asked: Sequence[Factors]) -> Iterator[Group]:
    """Each factor with the prompts that ask for a known value; then all, with those that ask for several, all known."""
    sizes = [len(values) for values in probe.config.classes.values()]
    for column, (name, size) in enumerate(zip(probe.config.classes, sizes, strict=True)):
        rows = (labels[:, column] != UNKNOWN).nonzero()[:, 0]
        if len(rows) > 1:
            yield Group(name, torch.tensor([column]), rows, size)
    told = torch.tensor([len(row) for row in asked])
    rows = ((told > 1) & ((labels != UNKNOWN).sum(dim=1) == told)).nonzero()[:, 0]
    if len(rows) > 1:
        yield Group(ALL, torch.arange(len(sizes)), rows, math.prod(sizes))


def matches(seen: Int[Tensor, "p m f"], told: Int[Tensor, "q f"]) -> Bool[Tensor, "p m q"]:
    """Whether a picture shows all that a prompt tells; what it does not tell may be anything."""
    found = torch.ones(*seen.shape[:2], len(told), dtype=torch.bool)
    for column in range(told.shape[1]):
        wanted = told[:, column]
        found &= (seen[:, :, column, None] == wanted) | (wanted == UNKNOWN)
    return found


def guesses(probe: Probe, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b f"]:
    """The value of each factor that the probe finds likeliest."""
    return torch.stack([scores.argmax(dim=1) for scores in all_logits(probe, images).values()], dim=1)


def all_logits(probe: Probe, images: Float[Tensor, "b c H W"]) -> Mapping[str, Float[Tensor, "b k"]]:
    """Logits of each factor, on the CPU."""
    device = next(probe.parameters()).device
    with eval_mode(probe):
        parts = [probe(part.to(device)) for part in images.split(TOGETHER)]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in probe.config.classes}
