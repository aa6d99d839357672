"""Whether a CLIP's logit scale makes probabilities of its cosines that mean what they say.

Axes: n queries, m candidates.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.checks import check_rows

BINS = 15  # Guo et al. 2017, section 2
SCALES = (0.1, 1000.0)
"""Between these the best scale is looked for; trained ones lie between 1 and 100."""


def choice_nats(scores: Float[Tensor, "n m"], right: Int[Tensor, " _"], scale: float | int) -> Float[Tensor, " n"]:
    """Negative log-probability of each query's right candidate under softmax(scale * scores).

    Args:
        scores: cosines.
        right: place of the right candidate of each query.
        scale: what the cosines are multiplied by.

    Raises:
        ValueError: other counts, or scores that are no numbers.
    """
    if len(right) != len(scores):
        raise UserError(f"{len(scores)} queries given, and the right candidates of {len(right)}")
    check_rows(scores, "scores", least=1)
    return F.cross_entropy(scale * scores.double(), right, reduction="none")


def best_scale(scores: Float[Tensor, "n m"], right: Int[Tensor, " _"]) -> float:
    """The scale of least mean ``choice_nats``, between 0.1 and 1000; they are convex in it, so that there is one."""
    low, high = (math.log(end) for end in SCALES)
    for _ in range(60):  # each keeps two thirds: 1e-10 of the range in the end
        first, second = low + (high - low) / 3, high - (high - low) / 3
        nats = [choice_nats(scores, right, math.exp(scale)).mean() for scale in (first, second)]
        low, high = (low, second) if nats[0] <= nats[1] else (first, high)
    return math.exp((low + high) / 2)


def calibration_error(confidences: Float[Tensor, " n"], right: Bool[Tensor, " _"], *, bins: int = BINS) -> float:
    """Expected calibration error: how far confidence and share of right choices are apart, in [0, 1].

    Args:
        confidences: probability of each choice.
        right: whether it was right.
        bins: of equal width in [0, 1]; in each the means are compared, weighted by its choices.

    Raises:
        ValueError: no bins, other counts, or confidences that are no probabilities.

    Source:
        Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.
    """
    if bins < 1 or len(right) != len(confidences):
        raise UserError(f"{len(confidences)} confidences, {len(right)} choices and {bins} bins do not fit together")
    check_rows(confidences, "confidences", least=1)
    if not ((confidences >= 0) & (confidences <= 1 + 1e-6)).all():
        raise UserError(f"confidences span [{confidences.min():.3g}, {confidences.max():.3g}], not [0, 1]")
    place = (confidences.double() * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, place, confidences.double() - right.double())
    return gaps.abs().sum().item() / len(confidences)
