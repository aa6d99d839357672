"""How far a number may be off: confidence intervals by drawing the samples again. The generator is always given.

Axes: n samples, r real samples, g generated samples, e features, _ = must equal e (an error says so).
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.checks import check_rows

Interval: TypeAlias = tuple[float, float]
"""Lower and upper end."""
LEVEL = 0.95
ROUNDS = 1000
"""Draws for the interval of a mean: its ends then vary by a few per cent of its width."""
HALVES = 50
"""Draws for the interval of a distance between sets, each of which is a whole evaluation."""


def bootstrap_mean(
    values: Float[Tensor, " n"],
    generator: torch.Generator,
    *,
    weights: Float[Tensor, " n"] | None = None,
    rounds: int = ROUNDS,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of a mean over samples: drawn with replacement, as many as there are (Efron 1979).

    The level is raised for few samples, whose plain percentiles are too narrow: of 16 they hold 92 % of the means.

    Args:
        values: one number a sample.
        generator: source of the draws.
        weights: then it is the interval of sum(values) / sum(weights), as of nats and tokens.
        rounds: how many draws.
        level: share of the draws inside.

    Raises:
        ValueError: fewer than two values, values that are no numbers, or settings out of range.

    Source:
        Hesterberg 2015, https://arxiv.org/abs/1411.5279, section 4.3, "expanded percentile interval".
    """
    _check(rounds, level)
    check_rows(values, "values to bootstrap", least=2)
    values = values.double().cpu()
    weights = torch.ones_like(values) if weights is None else weights.double().cpu()
    means = []
    for _ in range(rounds):
        drawn = torch.randint(len(values), (len(values),), generator=generator)
        means.append(values[drawn].sum() / weights[drawn].sum())
    return _percentiles(torch.stack(means), _expanded(level, len(values)))


def unanimous(count: int, *, level: float = LEVEL) -> float:
    """What a share may be off where all samples agree, and the bootstrap has nothing to draw from.

    The far end of the binomial's exact interval (Clopper and Pearson 1934): 0 of 16 may be 0.21.
    """
    return 1 - ((1 - level) / 2) ** (1 / count)


def half_samples(
    distance: Callable[[Tensor, Tensor], float],
    real: Float[Tensor, "r e"],
    generated: Float[Tensor, "g _"],
    generator: torch.Generator,
    *,
    group: int = 1,
    paired: bool = False,
    bounds: Interval = (-math.inf, math.inf),
    rounds: int = HALVES,
    level: float = LEVEL,
) -> Interval:
    """Interval of a distance between two sets, from random halves of both.

    The bootstrap draws samples twice, and a distance takes twins for a narrower distribution, so that its intervals
    miss the value. Halves drawn without replacement have no twins, and their standard deviation is that of the whole
    (delete-half jackknife); the interval is normal, since percentiles of so few draws are too narrow.

    Args:
        distance: of real and generated features.
        real: at least 4 samples.
        generated: at least 4 groups.
        generator: source of the halves.
        group: so many generated samples in a row belong together, as pictures of one prompt do, and are drawn together.
        paired: generated sample i is made of real sample i, as a reconstruction is: both are drawn or neither.
        bounds: what the distance cannot leave; the interval is cut there.
        rounds: how many.
        level: share of them inside.

    Raises:
        ValueError: too few samples, a group that does not divide them, pairs that are none, or settings out of range.

    Source:
        Shao and Wu 1989, "A general theory for jackknife variance estimation": deleting d of n samples gives the
        variance up to the factor (n - d) / d, which is 1 for halves.
    """
    _check(rounds, level)
    if group < 1 or len(generated) % group:
        raise ValueError(f"groups of {group} do not divide {len(generated)} generated samples")
    if paired and (group > 1 or len(real) != len(generated)):
        raise ValueError(f"{len(real)} real and {len(generated)} generated samples in groups of {group} are no pairs")
    check_rows(real, "real features", least=4)
    check_rows(generated, "generated features", least=4 * group)
    groups, values = torch.arange(len(generated)).view(-1, group), []
    for _ in range(rounds):
        of_real = torch.randperm(len(real), generator=generator)[: len(real) // 2]
        of_groups = of_real if paired else torch.randperm(len(groups), generator=generator)[: len(groups) // 2]
        values.append(distance(real[of_real], generated[groups[of_groups].flatten()]))
    spread = torch.tensor(values, dtype=torch.float64).std().item()
    half_width = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item() * spread
    whole = distance(real, generated)
    low, high = (min(max(end, bounds[0]), bounds[1]) for end in (whole - half_width, whole + half_width))
    return low, high


def _percentiles(values: Float[Tensor, " n"], level: float) -> Interval:
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype)
    low, high = torch.quantile(values, ends).tolist()
    return low, high


def _expanded(level: float, count: int) -> float:
    """The level at which normal quantiles reach as far as Student's with the unbiased standard error do."""
    z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
    free = count - 1
    # Cornish-Fisher: Abramowitz and Stegun 1964, 26.7.5
    student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return 2 * torch.special.ndtr(torch.tensor(student * (count / free) ** 0.5, dtype=torch.float64)).item() - 1


def _check(rounds: int, level: float) -> None:
    if rounds < 2:
        raise UserError(f"rounds must be at least 2, got {rounds}")
    if not 0 < level < 1:
        raise UserError(f"level must lie in (0, 1), got {level}")
