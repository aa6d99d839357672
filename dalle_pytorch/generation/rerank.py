"""Rank the candidates of a prompt with one CLIP or several, and keep the best.

Axes: m candidates, k kept, s scorers, c channels, H W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.pretrained_clip import PretrainedCLIP

Scorer: TypeAlias = CLIP | PretrainedCLIP
"""What ranks: a CLIP of ours, or a released one."""
SCORED_TOGETHER = 256
"""Pictures in one call of a scorer."""


class Ranking(NamedTuple):
    """The kept candidates, best first."""

    indices: Int[Tensor, " k"]
    """Positions among the candidates."""
    scores: Float[Tensor, " k"] | None
    """What they were ranked by: the cosine with the prompt, in [-1, 1]; with several scorers the mean of their cosines
    in standard deviations from their mean over the candidates. None without a scorer."""
    all_scores: Float[Tensor, " m"] | None
    """The same for all candidates, in their order."""


def score(images: Float[Tensor, "m c H W"], prompt: str, clips: Sequence[Scorer]) -> Float[Tensor, "s m"]:
    """Cosine of the prompt with every picture, as each scorer sees it.

    Args:
        images: RGB in [0, 1].
        prompt: what the user typed; cut to a scorer's context where longer.
        clips: the scorers; none gives an empty result.

    Raises:
        ValueError: a scorer carries no text tokenizer.
    """
    rows = [torch.empty(0, len(images))]
    for clip in clips:
        if clip.text_tokenizer is None:
            raise UserError("this clip carries no text tokenizer, so it cannot read prompts; set clip.text_tokenizer")
        device = clip.log_logit_scale.device
        text = clip.text_tokenizer.tokenize(prompt, clip.config.text_len, truncate=True).to(device)
        with eval_mode(clip):
            parts = [clip.scores(text, part.to(device)).cpu() for part in images.split(SCORED_TOGETHER)]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


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
