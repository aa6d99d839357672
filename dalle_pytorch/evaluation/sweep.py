"""How a DALLE should be sampled: the same prompts and seeds under every combination of some settings.

Axes: p prompts, m candidates of a prompt, r real pictures, c channels, H W pixels.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.dalle import Draw, judged
from dalle_pytorch.evaluation.features import Extractor
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Gallery, Section, Table
from dalle_pytorch.evaluation.report import Metrics, Protocol, shown
from dalle_pytorch.evaluation.scatter import Point, Scatter
from dalle_pytorch.generation.grid import GridRow
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.two_towers import TwoTowers

SHOWN = 8
"""Prompts on the page, a picture of each under every setting."""


@dataclass(kw_only=True)
class SweepConfig:
    """Values of ``sampling`` to try, in all combinations; null = as in ``sampling``. All null = no sweep."""

    temperature: list[float] | None = None
    """As sampling.temperature."""
    top_k: list[int] | None = None
    """As sampling.top_k."""
    top_p: list[float] | None = None
    """As sampling.top_p."""
    min_p: list[float] | None = None
    """As sampling.min_p."""
    cfg_scale: list[float] | None = None
    """As sampling.cfg_scale."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a list without values, or with one twice; names it.
        """
        for name, values in self.swept().items():
            if not values:
                raise UserError(f"sweep.{name} is an empty list: give the values to try, or leave it null")
            if len(set(values)) < len(values):
                raise UserError(f"sweep.{name} must hold different values, got {values}")

    def swept(self) -> dict[str, list[Any]]:
        """The fields that have values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(given) for name, given in values.items() if given is not None}

    def settings(self, sampling: SamplingConfig) -> dict[str, SamplingConfig]:
        """Every combination under its name, "temperature=0.7, cfg_scale=2"; nothing without a sweep.

        Args:
            sampling: what is not swept.

        Raises:
            UserError: a value is out of range, or does not go with the rest of ``sampling``; names both.
        """
        swept, found = self.swept(), {}
        for values in itertools.product(*swept.values()) if swept else ():
            changes: dict[str, Any] = dict(zip(swept, values, strict=True))
            name = ", ".join(f"{key}={value:g}" for key, value in changes.items())
            try:
                found[name] = replace(sampling, **changes)
            except UserError as error:
                raise UserError(f"sweep with {name}: {error}") from error
        return found


def pareto_best(scores: Sequence[float], distances: Sequence[float]) -> list[bool]:
    """Which points no other beats: none is at least as good in both numbers and better in one.

    Args:
        scores: higher is better.
        distances: lower is better; one a score.
    """
    points = list(zip(scores, distances, strict=True))
    return [
        not any(s >= score and d <= distance and (s, d) != (score, distance) for s, d in points)
        for score, distance in points
    ]


def evaluate_sweep(
    draw: Callable[[SamplingConfig], Float[Tensor, "p m c H W"]],
    settings: Mapping[str, SamplingConfig],
    prompts: Sequence[str],
    real: Float[Tensor, "r c H W"],
    own: Float[Tensor, "p c H W"],
    measure: Measure,
    *,
    judge: TwoTowers,
    captions: Sequence[str],
    extractors: Sequence[Extractor],
    how: Callable[[SamplingConfig], Protocol],
) -> Evaluation:
    """CLIP score, R-precision and distances of the pictures that each setting draws, and which settings are best.

    Args:
        draw: candidates of the prompts in [0, 1]; the same seeds whatever the setting.
        settings: how to sample, by name.
        prompts: what is drawn.
        real: pictures of the split, for distances.
        own: the real picture of each prompt.
        measure: the protocol.
        judge: a CLIP.
        captions: all different captions of the split, the prompts among them.
        extractors: for distances; the judge's among them.
        how: the protocol of a setting.
    """
    metrics: Metrics = {}
    found: dict[str, Metrics] = {}
    rows = []
    real_features = [extractor(real) for extractor in extractors]
    for name, sampling in settings.items():
        images, used = draw(sampling), how(sampling)
        one = judged(Draw(list(prompts), images, None), own, measure, judge, captions, used).metrics
        one = {key: metric for key, metric in one.items() if not key.endswith("_real")}
        for extractor, features in zip(extractors, real_features, strict=True):
            drawn = extractor(images.flatten(0, 1))
            one |= measure.distances(features, drawn, extractor, group=images.shape[1], how=used)
        slug = name.replace(", ", "_").replace("=", "_")
        metrics |= {f"{key}_at_{slug}": metric for key, metric in one.items()}
        found[name] = one
        rows.append(GridRow(name, list(images[:SHOWN, 0]), list(prompts[:SHOWN])))
    return Evaluation(metrics, [*trade_off(found), same_seeds(rows)])


def trade_off(found: Mapping[str, Metrics]) -> list[Section]:
    """The plot of distance against CLIP score, and the table, best score first.

    The distance is FID where the standard Inception is there, else CMMD through the judge.
    """
    names, first = list(found), next(iter(found.values()))
    distance = "fid" if "fid" in first else "cmmd"
    scores = [one["clip_score"] for one in found.values()]
    distances = [one[distance] for one in found.values()]
    best = pareto_best([metric.value for metric in scores], [metric.value for metric in distances])
    points = [
        Point(name, score.value, far.value, marked, score.interval, far.interval)
        for name, score, far, marked in zip(names, scores, distances, best, strict=True)
    ]
    title = {"fid": "FID", "cmmd": "CMMD"}[distance]
    marks = "Pareto-best: no other setting is better in both"
    note = (
        "The same prompts and seeds under every setting; right is nearer to the captions, down nearer to real "
        "pictures. Thin lines are 95 % intervals: where they overlap widely, the order may be chance."
    )
    plot = Scatter(f"Sampling: {title} against CLIP score", note, "CLIP score (higher is better)",
                   f"{title} (lower is better)", points, marks)  # fmt: skip
    order = sorted(range(len(names)), key=lambda place: -scores[place].value)
    rows = [
        (names[i], *(shown(metric.value) for metric in found[names[i]].values()), "yes" if best[i] else "")
        for i in order
    ]
    head = ("setting", *first, f"Pareto-best in {title} and CLIP score")
    note = "The best CLIP score first. Intervals are among the numbers of the page."
    return [plot, Table("Sampling: settings by CLIP score", note, head, rows)]


def same_seeds(rows: Sequence[GridRow]) -> Gallery:
    """The first candidate of some prompts, a row a setting."""
    note = "The first candidate of each prompt; a column has the same prompt and the same random numbers."
    return Gallery("Sampling: the same seeds under every setting", note, list(rows))
