"""How like a set of generated pictures is to a set of real ones, from features of both: FID, KID, CMMD and others.

Which network the features are of is features.py's business; every function here takes plain arrays.

Axes: r real samples, g generated samples, e features, k classes, _ = must equal e (an error says so).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.checks import check_rows, check_two

CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # google-research/cmmd, distance.py
ROWS = 1024
"""Rows of a distance matrix computed at once."""


def frechet_distance(real: Float[Tensor, "r e"], generated: Float[Tensor, "g _"]) -> float:
    """Squared Fréchet distance of two normal distributions with the means and covariances of the sets.

    With Inception's features this is FID. It is too high for few samples: compare only values of equal counts.
    Works where there are fewer samples than features, too: with X and Y the centred samples over the root of their
    count - 1, the trace of the covariances' root is the sum of singular values of X Y^T, which needs no matrix root.

    Raises:
        ValueError: fewer than two samples, unequal widths, or features that are no numbers.

    Source:
        Heusel et al. 2017, https://arxiv.org/abs/1706.08500, equation 6.
    """
    check_two(real, generated, least=2)
    real, generated = real.double(), generated.double()
    shift = real.mean(dim=0) - generated.mean(dim=0)
    x, y = _spread(real), _spread(generated)
    cross = torch.linalg.svdvals(x @ y.T).sum()
    return (shift.square().sum() + x.square().sum() + y.square().sum() - 2 * cross).clamp_min(0).item()


def kernel_distance(real: Float[Tensor, "r e"], generated: Float[Tensor, "g _"]) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / e + 1) ** 3, unbiased; can be negative.

    With Inception's features this is KID, over all samples at once rather than the mean over random subsets, which
    estimates the same with more noise.

    Raises:
        ValueError: fewer than two samples, unequal widths, or features that are no numbers.

    Source:
        Binkowski et al. 2018, https://arxiv.org/abs/1801.01401, section 4.
    """
    check_two(real, generated, least=2)
    real, generated = real.double(), generated.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    within = 0.0
    for rows in (real, generated):
        gram, count = kernel(rows, rows), len(rows)
        within += ((gram.sum() - gram.diagonal().sum()) / (count * (count - 1))).item()
    return within - 2 * kernel(real, generated).mean().item()


def cmmd(real: Float[Tensor, "r e"], generated: Float[Tensor, "g _"]) -> float:
    """Squared maximum mean discrepancy of unit features with a Gaussian kernel of width 10, times 1000.

    Meant for features of a CLIP; they are scaled to unit length here. The biased estimate of the reference: values are
    never negative, and a little high for few samples.

    Raises:
        ValueError: fewer than two samples, unequal widths, or features that are no numbers.

    Source:
        Jayasumana et al. 2024, https://arxiv.org/abs/2401.09603; google-research/cmmd, distance.py.
    """
    check_two(real, generated, least=2)
    x, y = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (real, generated))

    def mean(a: Tensor, b: Tensor) -> Tensor:
        squares = 2 - 2 * a @ b.T  # of the distances of unit vectors
        return torch.exp(-squares / (2 * CMMD_SIGMA**2)).mean()

    return CMMD_SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y)).clamp_min(0).item()


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    """Of the generated samples, those that lie among the real ones: quality."""
    recall: float
    """Of the real samples, those that lie among the generated ones: variety."""


def precision_recall(
    real: Float[Tensor, "r e"], generated: Float[Tensor, "g _"], *, neighbours: int = 3
) -> PrecisionRecall:
    """How much of each set lies in the other's estimated support: balls around samples up to their k-th neighbour.

    Args:
        real: features.
        generated: features.
        neighbours: k; the paper's is 3.

    Raises:
        ValueError: too few samples for k, unequal widths, or features that are no numbers.

    Source:
        Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991, section 2.
    """
    if neighbours < 1:
        raise UserError(f"neighbours must be at least 1, got {neighbours}")
    check_two(real, generated, least=neighbours + 1)
    real, generated = real.double(), generated.double()
    precision = _among(generated, real, neighbours).double().mean().item()
    return PrecisionRecall(precision, _among(real, generated, neighbours).double().mean().item())


def inception_score(logits: Float[Tensor, "g k"], *, splits: int = 1) -> float:
    """exp of the mean divergence of each picture's class probabilities from their mean; 1 to the number of classes.

    Args:
        logits: class scores of generated pictures.
        splits: parts of equal size, in order, whose scores are averaged (the paper: 10 of 5000); few samples need 1.

    Raises:
        ValueError: fewer than two samples a part, or scores that are no numbers.

    Source:
        Salimans et al. 2016, https://arxiv.org/abs/1606.03498, section 4.
    """
    if splits < 1:
        raise UserError(f"splits must be at least 1, got {splits}")
    check_rows(logits, "class scores", least=2 * splits)
    scores = []
    for part in logits.double().tensor_split(splits):
        log_p = part.log_softmax(dim=1)
        log_mean = log_p.logsumexp(dim=0) - torch.tensor(len(part), dtype=torch.float64, device=part.device).log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp().item())
    return sum(scores) / splits


def _spread(rows: Float[Tensor, "b e"]) -> Float[Tensor, "m e"]:
    """A matrix X of few rows with X^T X = the covariance."""
    centred = (rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R if len(rows) > rows.shape[1] else centred


def _among(points: Float[Tensor, "b e"], others: Float[Tensor, "o e"], neighbours: int) -> Bool[Tensor, " b"]:
    """Which points lie in the ball of one of the others."""
    # the nearest of a sample to its own set is itself
    radii = torch.cat([_distances(part, others).kthvalue(neighbours + 1, dim=1).values for part in others.split(ROWS)])
    return torch.cat([(_distances(part, others) <= radii).any(dim=1) for part in points.split(ROWS)])


def _distances(a: Float[Tensor, "b e"], b: Float[Tensor, "o e"]) -> Float[Tensor, "b o"]:
    # the faster way over products is inexact for near points
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
