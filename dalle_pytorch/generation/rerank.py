"""Rank the candidates of a prompt with a CLIP and keep the best.

Axes: m candidates, k kept, c channels, H W pixels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.models.mode import eval_mode


class Ranking(NamedTuple):
    """The kept candidates, best first."""

    indices: Int[Tensor, " k"]
    """Positions among the candidates."""
    scores: Float[Tensor, " k"] | None
    """Cosine with the prompt, in [-1, 1]; None without a scorer."""
    all_scores: Float[Tensor, " m"] | None
    """Scores of all candidates, in their order."""


def rerank(images: Float[Tensor, "m c H W"], prompt: str, clip: CLIP | None, num_keep: int) -> Ranking:
    """Keep the candidates that the CLIP finds closest to the prompt.

    Args:
        images: all candidates of one prompt; RGB in [0, 1].
        prompt: what the user typed; cut to the CLIP's context where longer.
        clip: the scorer; None keeps the first ``num_keep``.
        num_keep: 1 <= num_keep <= m.

    Raises:
        ValueError: num_keep is outside its range, or the CLIP carries no text tokenizer.

    Source:
        Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, section 2.6 (512 candidates a prompt). Equal scores
        keep their order, so that a seed fixes the output.
    """
    if not 1 <= num_keep <= len(images):
        raise ValueError(f"num_keep ({num_keep}) must lie in 1 to the number of candidates ({len(images)})")
    if clip is None:
        return Ranking(torch.arange(num_keep), None, None)
    if clip.text_tokenizer is None:
        raise ValueError("this clip carries no text tokenizer, so it cannot read prompts; set clip.text_tokenizer")
    device = clip.log_logit_scale.device
    text = clip.text_tokenizer.tokenize(prompt, clip.config.text_len, truncate=True).to(device)
    with eval_mode(clip):
        scores = torch.cat([clip.scores(text, part.to(device))[0].cpu() for part in images.split(256)])
    order = scores.argsort(descending=True, stable=True)[:num_keep]
    return Ranking(order, scores[order], scores)
