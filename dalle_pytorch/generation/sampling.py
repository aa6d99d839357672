"""From logits to a token: pure functions, one after the other. No global randomness.

Axes: b rows (candidates), k codebook_size.
"""

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor


def guide(cond: Float[Tensor, "b k"], uncond: Float[Tensor, "b k"], cfg_scale: float) -> Float[Tensor, "b k"]:
    """Classifier-free guidance: ``uncond + cfg_scale * (cond - uncond)``; 1 = the conditional logits.

    Source:
        Ho and Salimans 2021, https://arxiv.org/abs/2207.12598; on logits: Gafni et al. 2022, https://arxiv.org/abs/2203.13131.
    """
    return uncond + cfg_scale * (cond - uncond)


def keep_top_k(logits: Float[Tensor, "b k"], top_k: int) -> Float[Tensor, "b k"]:
    """All but the ``top_k`` highest set to -inf; exactly ``top_k`` stay, also among equals. 0 = off.

    Raises:
        ValueError: top_k is negative.
    """
    if top_k < 0:
        raise ValueError(f"top_k must be 0 (off) or positive, got {top_k}")
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    values, indices = logits.topk(top_k, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, values)


def keep_top_p(logits: Float[Tensor, "b k"], top_p: float) -> Float[Tensor, "b k"]:
    """The fewest tokens that hold at least ``top_p`` of the probability; the rest set to -inf. 1 = off.

    Raises:
        ValueError: top_p is not in (0, 1].

    Source:
        Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1] (1 = off), got {top_p}")
    if top_p == 1:
        return logits
    ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered.masked_fill(before >= top_p, -torch.inf))


def draw(
    logits: Float[Tensor, "b k"],
    uniform: Float[Tensor, " b"],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, " b"]:
    """One token a row, by inverting the cumulative distribution at ``uniform``.

    A row depends on its own logits and number only, so a candidate is the same in any batch.

    Args:
        logits: scores of the next token.
        uniform: one number in [0, 1) a row.
        temperature: divides the logits; 0 = the most likely token.
        top_k: keep so many tokens; 0 = all.
        top_p: keep the fewest tokens with so much probability; 1 = all.

    Raises:
        ValueError: temperature is negative, or top_k or top_p out of range.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative (0 = greedy), got {temperature}")
    if temperature == 0:
        return logits.argmax(dim=-1)
    kept = keep_top_p(keep_top_k(logits.float() / temperature, top_k), top_p)
    precise = torch.float32 if kept.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
    cumulative = kept.to(precise).softmax(dim=-1).cumsum(dim=-1)
    target = uniform.to(precise)[:, None] * cumulative[:, -1:]
    # the first token whose cumulative share exceeds the number: one of share 0 is never drawn
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def candidate_uniforms(prompt: str, seed: int, index: int, length: int) -> Float[Tensor, " length"]:
    """The random numbers of one candidate, a function of (prompt, seed, index) alone."""
    digest = hashlib.sha256(f"{seed}\0{index}\0{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % (1 << 63))
    return torch.rand(length, generator=generator)


def top_k_of_filter_thres(filter_thres: float, codebook_size: int) -> int:
    """DALLE-pytorch's ``filter_thres`` as a top_k: the share of tokens to drop, here of the image vocabulary.

    (DALLE-pytorch takes the share of text and image vocabulary together, so that its default drops nothing.)

    Raises:
        ValueError: filter_thres is not in [0, 1].
    """
    if not 0 <= filter_thres <= 1:
        raise ValueError(f"filter_thres is the share of tokens to drop, in [0, 1]; got {filter_thres}")
    return max(int(round((1 - filter_thres) * codebook_size, 6)), 1)  # rounded: 1 - 0.9 is a little less than 0.1
