"""Schedules as pure functions of the step."""

import math
from dataclasses import dataclass

from dalle_pytorch.errors import UserError

SHAPES = ("half_cosine", "quarter_cosine", "linear", "constant")
LR_SCHEDULES = ("cosine", "wsd", "paper", "constant")


@dataclass(kw_only=True)
class ScheduleConfig:
    """A value that moves from ``start`` to ``end`` and then stays there."""

    start: float = 1.0
    """Value at step 0."""
    end: float = 1.0
    """Value from ``share`` of the training on."""
    share: float = 1.0
    """Part of the training that the change takes, in (0, 1]; the paper: 0.05 for the VAE's temperature."""
    shape: str = "half_cosine"
    """half_cosine, quarter_cosine (slow start), linear, or constant (``start`` all along)."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: an unknown shape, or a share outside (0, 1].
        """
        if self.shape not in SHAPES:
            raise UserError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        if not 0 < self.share <= 1:
            raise UserError(f"share must lie in (0, 1], got {self.share}")


def ramp(shape: str, progress: float) -> float:
    """How far a schedule has come.

    Args:
        shape: one of `SHAPES`.
        progress: part of the change that is over; clipped to [0, 1].

    Returns:
        0 at the start, 1 at the end; always 0 for "constant".

    Source:
        Ramesh et al. 2021, section A.2 says "cosine" only; both readings in use are here (half: 1/2 - cos(pi t)/2;
        quarter: 1 - cos(pi t / 2)).
    """
    t = min(max(progress, 0.0), 1.0)
    if shape == "constant":
        return 0.0
    if shape == "linear":
        return t
    if shape == "quarter_cosine":
        return 1 - math.cos(t * math.pi / 2)
    return 0.5 - 0.5 * math.cos(t * math.pi)


def scheduled(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Value of a schedule at a step of a training of ``total_steps``."""
    progress = step / max(1.0, config.share * total_steps)
    return config.start + (config.end - config.start) * ramp(config.shape, progress)


def lr_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    schedule: str,
    min_ratio: float,
    halvings: int = 5,
    decay_share: float = 0.2,
) -> float:
    """What the learning rate is multiplied by at a step: linear warm-up, then what the schedule says.

    Args:
        step: optimiser steps taken, from 0; the first step already moves (1 / warmup_steps).
        total_steps: of the whole training.
        warmup_steps: steps to the full rate; 0 = none.
        schedule: "cosine" (half a cosine down to ``min_ratio`` at the last step), "wsd" (1, and a line down to
            ``min_ratio`` in the last ``decay_share`` of the training), "paper" (halved ``halvings`` times) or
            "constant".
        min_ratio: last factor of the cosine and of wsd, in [0, 1].
        halvings: of "paper", at least 0.
        decay_share: of "wsd", in (0, 1].

    Source:
        "wsd", warm-up, stable, decay: Hu et al. 2024 (MiniCPM), https://arxiv.org/abs/2404.06395, section 4; a line and
        a fifth of the training: Hägele et al. 2024, https://arxiv.org/abs/2405.18392, section 4.
        "paper": Ramesh et al. 2021, section B.2: halved at each apparent plateau of the loss, five times in all. We
        deviate and look at no loss: the halvings divide what follows the warm-up into ``halvings + 1`` equal parts.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done, whole = step - warmup_steps, max(1, total_steps - warmup_steps)
    if schedule == "paper":
        return 0.5 ** min(halvings, done * (halvings + 1) // whole)
    if schedule == "wsd":
        share = min(1.0, max(0.0, 1 - (total_steps - step) / (decay_share * total_steps)))
        return 1 - (1 - min_ratio) * share
    return 1 - (1 - min_ratio) * ramp("half_cosine", done / whole)
