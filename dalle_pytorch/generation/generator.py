"""From a prompt to ranked pictures: sample candidates, decode, score, keep the best.

Axes: b candidates of a micro-batch, n image tokens, t text tokens, m candidates of a prompt, c channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.generation.rerank import Ranking, rerank
from dalle_pytorch.generation.sampling import candidate_uniforms, draw, guide
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.models.dalle import DALLE
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.text import TextTokenizer


@dataclass(kw_only=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the logits; 0 = greedy, which tends to blank pictures."""
    top_k: int = 0
    """Draw among so many most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Draw among the fewest tokens with so much probability; 1 = all."""
    cfg_scale: float = 1.0
    """Guidance, uncond + cfg_scale * (cond - uncond); 1 = off. Needs a model trained with caption_dropout."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative (0 = greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] (1 = off), got {self.top_p}")


class Candidates(NamedTuple):
    """All samples of one prompt, in index order."""

    image_tokens: Int[Tensor, "m n"]
    images: Float[Tensor, "m c H W"]
    """In [0, 1]."""


def generate_image_tokens(
    dalle: DALLE,
    text_tokens: Int[Tensor, "b t"],
    uniforms: Float[Tensor, "b n"],
    sampling: SamplingConfig,
    *,
    given_tokens: Int[Tensor, "b given"] | None = None,
) -> Int[Tensor, "b n"]:
    """Sample the picture tokens of captions; the inputs and the train flag are left as they were.

    Args:
        dalle: the model.
        text_tokens: captions, 0 = padding.
        uniforms: a number in [0, 1) for every row and position; position i decides image token i.
        sampling: temperature, truncation and guidance.
        given_tokens: the first tokens of every picture, kept as they are (completion).

    Raises:
        ValueError: shapes that do not fit; names them.
    """
    if tuple(uniforms.shape) != (len(text_tokens), dalle.num_image_tokens):
        raise ValueError(
            f"uniforms of shape {tuple(uniforms.shape)} given, expected (captions, image tokens) = "
            f"({len(text_tokens)}, {dalle.num_image_tokens})"
        )
    with eval_mode(dalle):
        rows = len(text_tokens)
        guided = sampling.cfg_scale != 1
        if given_tokens is None:
            given_tokens = text_tokens.new_empty(rows, 0)
        text, given = text_tokens, given_tokens
        if guided:  # the lower half of the batch reads the empty caption
            text, given = torch.cat([text, torch.zeros_like(text)]), torch.cat([given, given])
        tokens = torch.empty(rows, dalle.num_image_tokens, dtype=torch.long, device=text.device)
        tokens[:, : given.shape[1]] = given_tokens
        if given.shape[1] == dalle.num_image_tokens:
            return tokens
        cache = dalle.new_cache()
        logits = dalle.prefill(text, given, cache)
        for position in range(given.shape[1], dalle.num_image_tokens):
            if position > given.shape[1]:
                last = tokens[:, position - 1]
                logits = dalle.step(torch.cat([last, last]) if guided else last, cache)
            if guided:
                cond, uncond = logits.chunk(2)
                logits = guide(cond, uncond, sampling.cfg_scale)
            tokens[:, position] = draw(
                logits,
                uniforms[:, position].to(logits.device),
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
            )
        return tokens


class Generator:
    """A DALLE with its text tokenizer and, for ranking, a CLIP.

    Args:
        dalle: a model whose ``text_tokenizer`` is set, as training and ``load`` leave it.
        clip: ranks the candidates; None = they keep their order and have no score.
        batch_size: candidates sampled together; changes memory and speed, not the pictures.

    Raises:
        ValueError: a model without a text tokenizer, or a batch_size below 1.
    """

    def __init__(self, dalle: DALLE, clip: CLIP | None = None, *, batch_size: int = 64) -> None:
        self.dalle, self.clip, self.batch_size = dalle, clip, batch_size
        self.tokenizer = text_tokenizer_of(dalle, "dalle")
        if clip is not None:
            text_tokenizer_of(clip, "clip")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    def check(self, prompts: Sequence[str], *, truncate: bool = False) -> None:
        """Refuse prompts that cannot be read, before time is spent on the first.

        Raises:
            ValueError: one is longer than the model's context; shows it.
        """
        for prompt in prompts:
            self.tokenizer.tokenize(prompt, self.dalle.config.text_len, truncate=truncate)

    @torch.no_grad()
    def candidates(
        self,
        prompt: str,
        indices: Sequence[int],
        *,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        truncate: bool = False,
        progress: Callable[[int], object] = lambda done: None,
    ) -> Candidates:
        """Sample candidates of a prompt; each is a function of (prompt, seed, index).

        Args:
            prompt: what to draw.
            indices: which candidates, for instance ``range(64)``.
            seed: another seed gives other candidates.
            sampling: temperature, truncation and guidance.
            truncate: cut a prompt longer than the context instead of raising.
            progress: called with the number of candidates that have just been finished.

        Raises:
            ValueError: the prompt is longer than the context, or guidance of a model that never saw an empty one.
        """
        sampling = sampling or SamplingConfig()
        if sampling.cfg_scale != 1 and not self.dalle.config.caption_dropout:
            raise ValueError(
                f"cfg_scale={sampling.cfg_scale} needs a model that has seen empty captions; this one was trained with "
                "caption_dropout=0: use cfg_scale=1"
            )
        device = next(self.dalle.parameters()).device
        text_len = self.dalle.config.text_len
        text = self.tokenizer.tokenize(prompt, text_len, truncate=truncate).to(device)
        tokens, images = [], []
        for first in range(0, len(indices), self.batch_size):
            part = indices[first : first + self.batch_size]
            uniforms = torch.stack(
                [candidate_uniforms(prompt, seed, index, self.dalle.num_image_tokens) for index in part]
            )
            drawn = generate_image_tokens(self.dalle, text.expand(len(part), -1), uniforms, sampling)
            tokens.append(drawn.cpu())
            images.append(self.dalle.vae.decode(drawn).cpu())
            progress(len(part))
        return Candidates(torch.cat(tokens), torch.cat(images))

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        num_candidates: int,
        num_keep: int,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        truncate: bool = False,
        progress: Callable[[int], object] = lambda done: None,
    ) -> tuple[Candidates, Ranking]:
        """Sample, rank and keep.

        Returns:
            All candidates, and the ``num_keep`` best of them, best first.

        Raises:
            ValueError: counts out of range, or the prompt is too long.
        """
        if not 1 <= num_keep <= num_candidates:
            raise ValueError(f"num_keep ({num_keep}) must lie in 1 to num_candidates ({num_candidates})")
        candidates = self.candidates(
            prompt, range(num_candidates), seed=seed, sampling=sampling, truncate=truncate, progress=progress
        )
        return candidates, rerank(candidates.images, prompt, self.clip, num_keep)


def text_tokenizer_of(model: DALLE | CLIP, kind: str) -> TextTokenizer:
    """The tokenizer a model carries.

    Raises:
        ValueError: it carries none.
    """
    if model.text_tokenizer is None:
        raise ValueError(
            f"this {kind} carries no text tokenizer, so it cannot read prompts; set {kind}.text_tokenizer, "
            "or load a checkpoint that our training wrote"
        )
    return model.text_tokenizer
