"""Rank the candidates of a prompt with one scorer or several, and keep the best.

Axes: m candidates, k kept, s scorers, c channels, H W pixels.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.two_towers import TwoTowers


@runtime_checkable
class Scorer(Protocol):
    """What ranks: a CLIP of ours, a released one, or any object with this method."""

    def score(self, images: Float[Tensor, "m c H W"], prompt: str) -> Float[Tensor, " m"]:
        """One finite number an image, higher = better. Numbers are compared among the candidates of a prompt only.

        Args:
            images: RGB in [0, 1], on the CPU; not to be changed.
            prompt: what the user typed.
        """
        ...


class Ranking(NamedTuple):
    """The kept candidates, best first."""

    indices: Int[Tensor, " k"]
    """Positions among the candidates."""
    scores: Float[Tensor, " k"] | None
    """What they were ranked by: the scorer's numbers (a CLIP's: the cosine with the prompt, in [-1, 1]); with several
    scorers the mean of their numbers in standard deviations from their mean over the candidates. None without one."""
    all_scores: Float[Tensor, " m"] | None
    """The same for all candidates, in their order."""


def as_scorers(given: Any) -> list[Scorer]:
    """A scorer, several of them, or None, as a list.

    Raises:
        UserError: one of them cannot rank; names it.
    """
    if given is None:
        return []
    several = isinstance(given, Iterable) and not isinstance(given, str | Scorer)
    scorers = list(given) if several else [given]
    for scorer in scorers:
        if isinstance(scorer, type):
            raise UserError(f"{scorer.__name__} is a class and cannot rank: give an object, {scorer.__name__}(...)")
        if not isinstance(scorer, Scorer):
            raise UserError(
                f"{type(scorer).__name__} cannot rank: it has no method score(images, prompt), as the protocol Scorer "
                "(dalle_pytorch.generation.rerank) wants it"
            )
        if isinstance(scorer, TwoTowers):
            scorer.tokenize("")  # a CLIP without text tokenizer is refused before candidates are drawn
    return scorers


def score(images: Float[Tensor, "m c H W"], prompt: str, scorers: Sequence[Scorer]) -> Float[Tensor, "s m"]:
    """What each scorer gives every image, on the CPU.

    Args:
        images: RGB in [0, 1].
        prompt: what the user typed.
        scorers: none gives an empty result.

    Raises:
        UserError: a scorer gives something else than one finite number an image; names it.
    """
    rows = [torch.empty(0, len(images))]
    for scorer in scorers:
        with torch.no_grad():
            rows.append(checked(scorer.score(images, prompt), len(images), f"{type(scorer).__name__}.score")[None])
    return torch.cat(rows)


def checked(scores: Any, count: int, source: str) -> Float[Tensor, " m"]:
    """Scores in fp32 on the CPU.

    Raises:
        UserError: they are not ``count`` finite numbers; names the source.
    """
    if not isinstance(scores, Tensor) or scores.shape != (count,):
        got = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise UserError(f"{source} gave {got} for {count} images, expected a tensor of shape ({count},)")
    scores = scores.detach().float().cpu()
    if bad := int((~scores.isfinite()).sum()):
        raise UserError(f"{source} gave numbers that are not finite for {bad} of {count} images")
    return scores


def vote(scores: Float[Tensor, "s m"]) -> Float[Tensor, " m"] | None:
    """One number a candidate: a lone scorer's own, or the mean of several put on one scale; None without any."""
    if len(scores) < 2:
        return scores[0] if len(scores) else None
    spread = scores.std(dim=1, keepdim=True, correction=0).clamp_min(1e-8)
    return ((scores - scores.mean(dim=1, keepdim=True)) / spread).mean(dim=0)


def rank(
    scores: Float[Tensor, "s m"], images: Float[Tensor, "m c H W"], num_keep: int, *, min_distance: float = 0.0
) -> Ranking:
    """Keep the best, without near-duplicates where asked.

    Args:
        scores: what ``score`` gave; without a scorer candidates keep their order.
        images: the candidates; read for ``min_distance`` only.
        num_keep: 1 <= num_keep <= m.
        min_distance: a candidate nearer than this to a better kept one is passed over, as root mean square difference
            of pixels in [0, 1]; where too few are left the passed ones fill up, best first. 0 = off.

    Raises:
        ValueError: num_keep or min_distance is outside its range.

    Source:
        Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, section 2.6 (512 candidates a prompt). Equal scores
        keep their order, so that a seed fixes the output.
    """
    count = len(images)
    if not 1 <= num_keep <= count:
        raise UserError(f"num_keep ({num_keep}) must lie in 1 to the number of candidates ({count})")
    if not 0 <= min_distance <= 1:
        raise UserError(f"min_distance must lie in [0, 1] (0 = off), got {min_distance}")
    votes = vote(scores)
    order = torch.arange(count) if votes is None else votes.argsort(descending=True, stable=True)
    if min_distance:
        order = apart(order, images, num_keep, min_distance)
    kept = order[:num_keep]
    return Ranking(kept, None if votes is None else votes[kept], votes)


def apart(
    order: Int[Tensor, " m"], images: Float[Tensor, "m c H W"], num_keep: int, min_distance: float
) -> Int[Tensor, " m"]:
    """The order with near-duplicates of what comes before them moved to the end."""
    kept: list[int] = []
    for index in order.tolist():
        difference = images[kept] - images[index]
        if len(kept) < num_keep and (difference.square().mean(dim=(1, 2, 3)).sqrt() >= min_distance).all():
            kept.append(index)
    rest = [index for index in order.tolist() if index not in set(kept)]
    return torch.tensor(kept + rest)
