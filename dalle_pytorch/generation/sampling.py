"""From logits to a token: pure functions, one after the other. No global randomness.

Axes: b rows (candidates), k codebook_size.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError, finite


@dataclass(kw_only=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 = greedy, which tends to blank pictures."""
    top_k: int = 0
    """Draw among so many most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Draw among the fewest tokens with so much probability; 1 = all."""
    min_p: float = 0.0
    """Draw among tokens at least so likely relative to the likeliest; 0 = all."""
    cfg_scale: float = 1.0
    """Guidance, uncond + cfg_scale * (cond - uncond); 1 = off. Needs a model trained with caption_dropout."""
    cfg_schedule: list[float] | None = None
    """Guidance over the image, in place of cfg_scale: values at even distances from the first token to the last, with
    straight lines between; [1, 4] grows from none to 4."""
    cfg_power: float | None = None
    """Let the guidance grow from none to cfg_scale by a power-cosine: slower at first the higher this is (RAR: 1.5 to
    2.75); null = constant."""
    cfg_interval: list[float] | None = None
    """Guide only between two shares of the image's tokens: [0, 0.5] = its upper half, which also saves the time of
    guidance in the lower; null = everywhere."""
    strategy: str = "raster"
    """How positions are filled: "raster" one by one; "speculative" several a step from guesses that are checked, which
    gives the same tokens, faster for one image or few (docs/sampling.md); "random" in a random order, which a model
    with any_order can."""
    draft_tokens: int = 8
    """Positions that a speculative step reads."""
    order_seed: int = 0
    """Which random order."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        finite(self)
        if self.temperature < 0:
            raise UserError(f"temperature must not be negative (0 = greedy), got {self.temperature}")
        if 0 < self.temperature < 1e-6:
            raise UserError(f"temperature={self.temperature} would overflow the logits; 0 = greedy")
        if max(map(abs, self.cfg_schedule or [self.cfg_scale])) > 1e6:
            name = "cfg_scale" if self.cfg_schedule is None else "cfg_schedule"
            raise UserError(f"{name}={getattr(self, name)} would overflow the logits; scales are around 1 to 10")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise UserError(f"top_k is a number of tokens, 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1] (1 = off), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1] (0 = off), got {self.min_p}")
        if self.cfg_schedule is not None:
            if not self.cfg_schedule:
                raise UserError("cfg_schedule is an empty list; leave it null for a constant cfg_scale")
            if self.cfg_scale != 1:
                raise UserError(
                    f"cfg_scale={self.cfg_scale} and cfg_schedule={self.cfg_schedule} are both set; choose one"
                )
        if self.cfg_power is not None:
            if self.cfg_schedule is not None:
                raise UserError("cfg_power and cfg_schedule are both set; choose one")
            if not self.cfg_power > 0:
                raise UserError(f"cfg_power must be positive, got {self.cfg_power}")
        if self.cfg_interval is not None:
            bounds = list(self.cfg_interval)
            if len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] <= 1:
                raise UserError(f"cfg_interval must be two rising shares in [0, 1], as [0, 0.5], got {bounds}")
        if self.draft_tokens < 2:
            raise UserError(f"draft_tokens must be at least 2, got {self.draft_tokens}")

    def scales(self, count: int) -> list[float]:
        """Guidance scale of each of ``count`` tokens; 1 = none.

        Source:
            The power-cosine is RAR's, Yu et al. 2024, https://arxiv.org/abs/2411.00776; an interval Kynkäänniemi et al.
            2024, https://arxiv.org/abs/2404.07724 (of noise levels there, of raster positions here).
        """
        points = [self.cfg_scale] if self.cfg_schedule is None else list(self.cfg_schedule)
        low, high = self.cfg_interval or (0.0, 1.0)
        scales = []
        for index in range(count):
            share, scale = index / max(count - 1, 1), points[0]
            if len(points) > 1:
                at = share * (len(points) - 1)
                left = min(int(at), len(points) - 2)
                scale = points[left] + (at - left) * (points[left + 1] - points[left])
            if self.cfg_power is not None:
                scale = 1 + (scale - 1) * (1 - math.cos(math.pi * share**self.cfg_power)) / 2
            scales.append(scale if low * count <= index < high * count else 1.0)
        return scales

    def guided(self) -> bool:
        """Whether any token needs the null twin of its prompt."""
        return any(scale != 1 for scale in self.cfg_schedule or [self.cfg_scale])

    def pick(self, logits: Float[Tensor, "b k"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        """One token a row, by inverting the cumulative distribution at a number in [0, 1).

        A row depends on its own logits and number only, so a candidate is the same in any batch.
        """
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        kept = keep_top_p(keep_top_k(logits.float() / self.temperature, self.top_k), self.top_p)
        kept = keep_min_p(kept, self.min_p)
        precise = torch.float32 if kept.device.type == "mps" else torch.float64  # Apple's GPUs have no doubles
        cumulative = kept.to(precise).softmax(dim=-1).cumsum(dim=-1)
        target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        # the first token whose cumulative share exceeds the number: one of share 0 is never drawn
        return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def guide(
    cond: Float[Tensor, "*b k"], uncond: Float[Tensor, "*b k"], cfg_scale: float | Float[Tensor, "..."]
) -> Float[Tensor, "*b k"]:
    """Classifier-free guidance: ``uncond + cfg_scale * (cond - uncond)``; 1 = the conditional logits.

    Source:
        Ho and Salimans 2021, https://arxiv.org/abs/2207.12598; on logits: Gafni et al. 2022, https://arxiv.org/abs/2203.13131.
    """
    return uncond + cfg_scale * (cond - uncond)


def sorted_down(logits: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Each row from its highest to its lowest. On a CPU by numpy: its vectorised sort takes a 25th of torch's time."""
    if logits.device.type == "cpu":
        return torch.from_numpy(-np.sort(-logits.detach().numpy(), axis=-1))
    return logits.sort(dim=-1, descending=True).values


def keep_counts(
    logits: Float[Tensor, "b k"], ordered: Float[Tensor, "b k"], counts: int | Int[Tensor, "b 1"]
) -> Float[Tensor, "b k"]:
    """All but the ``counts`` highest of each row set to -inf; exactly as many stay: of equals the first ones.

    Args:
        logits: scores.
        ordered: the same rows, sorted down.
        counts: at least 1 and at most k.
    """
    if isinstance(counts, int):
        counts = torch.full((len(logits), 1), counts, device=logits.device)
    lowest = ordered.gather(-1, counts - 1)
    next_lower = ordered.gather(-1, counts.clamp_max(ordered.shape[-1] - 1))
    # nearly always nothing equals the lowest; a GPU would have to be waited for to know
    if logits.device.type == "cpu" and bool((next_lower < lowest).all()):
        return logits.masked_fill(logits < lowest, -torch.inf)
    kept, equal = logits > lowest, logits == lowest
    room = counts - kept.sum(dim=-1, keepdim=True)
    kept |= equal & (equal.cumsum(dim=-1) <= room)
    return logits.masked_fill(~kept, -torch.inf)


def keep_top_k(logits: Float[Tensor, "b k"], top_k: int) -> Float[Tensor, "b k"]:
    """All but the ``top_k`` highest set to -inf; exactly ``top_k`` stay, also among equals. 0 = off."""
    if top_k == 0 or top_k >= logits.shape[-1]:
        return logits
    logits = logits.float()
    return keep_counts(logits, sorted_down(logits), top_k)


def keep_top_p(logits: Float[Tensor, "b k"], top_p: float) -> Float[Tensor, "b k"]:
    """The fewest tokens that hold at least ``top_p`` of the probability; the rest set to -inf. 1 = off.

    Source:
        Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
    """
    if top_p == 1:
        return logits
    logits = logits.float()
    ordered = sorted_down(logits)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return keep_counts(logits, ordered, (before < top_p).sum(dim=-1, keepdim=True).clamp_min(1))


def keep_min_p(logits: Float[Tensor, "b k"], min_p: float) -> Float[Tensor, "b k"]:
    """Tokens at least ``min_p`` times as likely as the likeliest; the rest set to -inf. 0 = off.

    Source:
        Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    """
    if min_p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -torch.inf)


def candidate_uniforms(prompt: str, seed: int, index: int, length: int) -> Float[Tensor, " length"]:
    """The random numbers of one candidate, a function of (prompt, seed, index) alone."""
    digest = hashlib.sha256(f"{seed}\0{index}\0{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") % (1 << 63))
    return torch.rand(length, generator=generator)
