"""From values of samples to numbers with intervals and protocols, the same way for every kind of model.

Axes: n samples, r real samples, g generated samples, e features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.evaluation.bootstrap import Interval, bootstrap_mean, half_samples, unanimous
from dalle_pytorch.evaluation.distribution import cmmd, frechet_distance, kernel_distance, precision_recall
from dalle_pytorch.evaluation.features import Extractor
from dalle_pytorch.evaluation.page import Section
from dalle_pytorch.evaluation.report import Metric, Metrics, Protocol


class Evaluation(NamedTuple):
    """What came out."""

    metrics: Metrics
    sections: list[Section]
    """Of the page, in order."""


@dataclass(frozen=True)
class Measure:
    """Makes numbers under one protocol; every interval has a generator of its own, so that none depends on others."""

    protocol: Protocol
    """Of all numbers: data, split, size."""
    seed: int = 0
    """Of the intervals."""
    rounds: int = 1000
    """Draws for the interval of a mean."""
    halves: int = 50
    """Draws for the interval of a distance between sets; 0 = none, for large features."""

    def generator(self) -> torch.Generator:
        """A new source of randomness."""
        return torch.Generator().manual_seed(self.seed)

    def mean(
        self,
        values: Float[Tensor, " n"],
        *,
        weights: Float[Tensor, " n"] | None = None,
        most: float | int | None = None,
        unit: str = "",
        better: str = "higher",
        extractor: Extractor | None = None,
        how: Protocol = MappingProxyType({}),
    ) -> Metric:
        """A mean over samples, or sum(values) / sum(weights); ``how`` adds to the protocol.

        ``most`` is what each value of a share can be, 1 or 100 %: where all are 0 or all are that, the interval is that
        of a binomial.
        """
        values = values.double().cpu()
        total = len(values) if weights is None else weights.sum().item()
        interval = bootstrap_mean(values, self.generator(), weights=weights, rounds=self.rounds)
        if most is not None and interval in ((0, 0), (most, most)):
            off = most * unanimous(len(values))
            interval = (max(interval[0] - off, 0.0), min(interval[1] + off, float(most)))
        return self.number(
            values.sum().item() / total,
            len(values),
            interval,
            unit=unit,
            better=better,
            extractor=extractor,
            how=how,
        )

    def number(
        self,
        value: float,
        count: int,
        interval: tuple[float, float] | None = None,
        *,
        unit: str = "",
        better: str = "higher",
        extractor: Extractor | None = None,
        how: Protocol = MappingProxyType({}),
    ) -> Metric:
        """A number that is there already."""
        return Metric(
            value=value,
            count=count,
            interval=interval,
            protocol={**self.protocol, **how},
            extractor=None if extractor is None else f"{extractor.name} ({extractor.protocol})",
            weights_sha256=None if extractor is None else extractor.weights_sha256,
            unit=unit,
            better=better,
        )

    def distances(
        self,
        real: Float[Tensor, "r e"],
        generated: Float[Tensor, "g e"],
        extractor: Extractor,
        *,
        paired: bool = False,
        suffix: str = "",
        group: int = 1,
        how: Protocol = MappingProxyType({}),
    ) -> Metrics:
        """FID, KID, precision and recall of features, with a CLIP also CMMD.

        Only those of the standard Inception bear the plain names; others say their extractor: fid_clip. Of ``paired``
        samples, reconstructions of the real ones in their order, they are rfid, rkid, reconstruction_precision, ...
        ``group`` is how many generated samples in a row belong together (see bootstrap.half_samples).
        """
        unusual = "" if extractor.name == "inception" else f"_{extractor.name}"
        share, positive = (0.0, 1.0), (0.0, math.inf)
        functions: dict[str, tuple[Callable[[Tensor, Tensor], float], str, Interval]] = {
            "fid": (frechet_distance, "lower", positive),
            "kid": (kernel_distance, "lower", (-math.inf, math.inf)),  # unbiased, so that 0 is no bound
            "precision": (lambda x, y: precision_recall(x, y).precision, "higher", share),
            "recall": (lambda x, y: precision_recall(x, y).recall, "higher", share),
        }
        if extractor.name == "clip":
            functions["cmmd"] = (cmmd, "lower", positive)
        found = {}
        for name, (function, better, bounds) in functions.items():
            interval = None
            if self.halves and min(len(real), len(generated) // group) >= 16:  # halves of fewer say little
                interval = half_samples(
                    function, real, generated, self.generator(),
                    group=group, paired=paired, bounds=bounds, rounds=self.halves,
                )  # fmt: skip
            prefix = "" if not paired else "reconstruction_" if bounds == share else "r"
            found[f"{prefix}{name}{'' if name == 'cmmd' else unusual}{suffix}"] = self.number(
                function(real, generated), len(generated), interval,
                better=better, extractor=extractor, how={**how, "real_samples": len(real)},
            )  # fmt: skip
        return found
