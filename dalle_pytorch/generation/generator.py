"""From a prompt to ranked pictures: sample candidates, decode, score, keep the best.

Axes: b candidates of a micro-batch, n image tokens, t text tokens, m candidates of a prompt, s scorers, c channels, H W
pixels.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.rerank import Ranking, Scorer, as_scorers, rank, score
from dalle_pytorch.generation.sampling import SamplingConfig, candidate_uniforms
from dalle_pytorch.generation.strategies import KnownTokens, draw_image_tokens
from dalle_pytorch.models.text_to_image import TextToImage
from dalle_pytorch.models.two_towers import TwoTowers
from dalle_pytorch.text import TextTokenizer

MOST = 256
"""Candidates drawn together at most, guidance's twins included: on a CPU more of them take as long each."""
DECODED_TOGETHER = 32
"""Pictures in one call of the image tokenizer: its activations are far larger than its output."""


class Candidates(NamedTuple):
    """Samples of one prompt."""

    image_tokens: Int[Tensor, "m n"]
    images: Float[Tensor, "m c H W"]
    """In [0, 1]."""
    indices: list[int]
    """Their numbers: each is a function of (prompt, seed, index)."""


class Preview(NamedTuple):
    """A micro-batch on its way."""

    image_tokens: Int[Tensor, "b n"]
    """Drawn up to ``done``; a copy."""
    done: int
    """Image tokens drawn of each candidate."""
    indices: list[int]
    """Which candidates these are."""


class Ranked(NamedTuple):
    """All that is finished, ranked anew after every micro-batch."""

    candidates: Candidates
    scores: Float[Tensor, "s m"]
    """Of each candidate, a row a scorer (of a CLIP: cosines with the prompt)."""
    ranking: Ranking


class SampleOptions(TypedDict, total=False):
    """How candidates are drawn; every method that draws takes these."""

    seed: int
    """Another seed gives other candidates; 0."""
    sampling: SamplingConfig | None
    """Temperature, truncation and guidance; None = as the model is."""
    given: KnownTokens | None
    """Image tokens that stay as they are; None = none."""
    negative_prompt: str
    """What guidance leads away from; "" = the empty caption."""
    truncate: bool
    """Cut a prompt longer than the context instead of raising; False."""
    preview_rows: int
    """Give a Preview after so many token rows each; 0 = none."""
    progress: Callable[[int], object]
    """Called with the number of image tokens that have just been drawn."""


class Generator:
    """A DALLE with its text tokenizer and, for ranking, one scorer or several.

    Args:
        dalle: a model whose ``text_tokenizer`` is set, as training and ``load`` leave it. Its weights are laid out for
            sampling here: make another Generator after training on.
        clip: ranks the candidates, a CLIP or any ``rerank.Scorer``; several vote; None = they keep their order and
            have no score.
        batch_size: candidates sampled together; None = as many as ``memory_gb`` holds. Memory and speed, not
            the pictures.
        memory_gb: memory for the keys and values of candidates, in 10^9 bytes.
        precision: arithmetic of the DALLE's linear layers, "fp32", "bf16", "fp16" or "int8" (CPU). Faster, and other
            pictures.
        compiled: translate a step with torch.compile, which takes half a minute the first time; pays with int8.

    Raises:
        ValueError: a model without a text tokenizer, a ranker that is no Scorer, or settings out of range.
    """

    def __init__(
        self,
        dalle: TextToImage,
        clip: Scorer | Sequence[Scorer] | None = None,
        *,
        batch_size: int | None = None,
        memory_gb: float = 4.0,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        self.dalle, self.batch_size, self.memory_gb = dalle, batch_size, memory_gb
        self.clips = as_scorers(clip)
        self.tokenizer = text_tokenizer_of(dalle, "dalle")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if memory_gb <= 0:
            raise UserError(f"memory_gb must be positive, got {memory_gb}")
        self.decoder = Decoder(dalle, precision=precision, compiled=compiled)

    def check(self, prompts: Sequence[str], sampling: SamplingConfig | None = None, *, truncate: bool = False) -> None:
        """Refuse what cannot be drawn, before time is spent on the first prompt.

        Raises:
            ValueError: a prompt is longer than the model's context (shows it), or guidance of a model that never saw an
                empty caption.
        """
        for prompt in prompts:
            self.tokenizer.tokenize(prompt, self.dalle.config.text_len, truncate=truncate)
        if sampling is not None and sampling.guided() and not self.dalle.config.caption_dropout:
            raise UserError(
                f"guidance (cfg_scale={sampling.cfg_scale}, cfg_schedule={sampling.cfg_schedule}) needs a model that "
                "has seen empty captions; this one was trained with caption_dropout=0: use cfg_scale=1"
            )

    def micro_batch(self, sampling: SamplingConfig) -> int:
        """Candidates drawn together: ``batch_size``, or what the memory holds, at least one."""
        if self.batch_size is not None:
            return self.batch_size
        guided = sampling.guided()
        affordable = int(self.memory_gb * 1e9) // self.decoder.bytes_per_candidate(guided=guided)
        return max(min(affordable, MOST // 2 if guided else MOST), 1)

    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Pictures of image tokens, on the CPU."""
        with torch.no_grad():
            parts = image_tokens.to(self.decoder.device).split(DECODED_TOGETHER)
            return torch.cat([self.dalle.vae.decode(part).float().cpu() for part in parts])

    def given(self, image: Float[Tensor, "c H W"], keep: Bool[Tensor, " n"]) -> KnownTokens:
        """A picture's image tokens, of which some stay.

        Args:
            image: RGB in [0, 1], of the model's size.
            keep: True = the token stays, in raster order.
        """
        with torch.no_grad():
            return KnownTokens(self.dalle.vae.encode(image[None].to(self.decoder.device)).cpu(), keep)

    def sample(
        self,
        prompt: str,
        indices: Sequence[int],
        *,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        given: KnownTokens | None = None,
        negative_prompt: str = "",
        truncate: bool = False,
        preview_rows: int = 0,
        progress: Callable[[int], object] = lambda drawn: None,
    ) -> Iterator[Preview | Candidates]:
        """Sample candidates of a prompt, a micro-batch after the other; each is a function of (prompt, seed, index).

        Closing the iterator frees what the unfinished micro-batch holds.

        Args:
            prompt: what to draw.
            indices: which candidates, for instance ``range(64)``; none of them gives nothing.
            seed: this and the others: see SampleOptions.

        Raises:
            ValueError: the prompt is longer than the context, or guidance of a model that never saw an empty one.
        """
        sampling, dalle = sampling or SamplingConfig(), self.dalle
        self.check([prompt], sampling, truncate=truncate)
        if sampling.temperature == 0 and len(indices) > 1:
            warnings.warn(
                f"temperature=0 makes all {len(indices)} candidates of a prompt equal; use a positive one", stacklevel=2
            )
        if negative_prompt and not sampling.guided():
            raise UserError(f"negative_prompt={negative_prompt!r} acts through guidance: set cfg_scale above 1")
        text, null = (
            self.tokenizer.tokenize(part, dalle.config.text_len, truncate=truncate).to(self.decoder.device)
            for part in (prompt, negative_prompt)
        )
        size = self.micro_batch(sampling)
        for first in range(0, len(indices), size):
            part = list(indices[first : first + size])
            uniforms = torch.stack([candidate_uniforms(prompt, seed, index, dalle.num_image_tokens) for index in part])
            if first and self.decoder.compiled:  # fill up: another size would be another program to translate
                uniforms = torch.cat([uniforms, uniforms[:1].expand(size - len(part), -1)])
            done, tokens = 0, torch.empty(0)
            for now, tokens in draw_image_tokens(self.decoder, text, uniforms.to(text.device), sampling, given, null):
                progress((now - done) * len(part))
                done = now
                if preview_rows and done % (preview_rows * dalle.grid_size) == 0 and done < dalle.num_image_tokens:
                    yield Preview(tokens[: len(part)].cpu().clone(), done, part)
            tokens = tokens[: len(part)]
            yield Candidates(tokens.cpu(), self.decode(tokens), part)

    def candidates(self, prompt: str, indices: Sequence[int], **options: Unpack[SampleOptions]) -> Candidates:
        """All of ``sample`` at once.

        Raises:
            ValueError: no indices; and as ``sample``.
        """
        if not indices:
            raise UserError("indices is empty: there is nothing to draw")
        return join([part for part in self.sample(prompt, indices, **options) if isinstance(part, Candidates)])

    def stream(
        self,
        prompt: str,
        indices: Sequence[int],
        *,
        num_keep: int,
        min_distance: float = 0.0,
        **options: Unpack[SampleOptions],
    ) -> Iterator[Preview | Ranked]:
        """Sample and rank; after every micro-batch the ranking of all candidates so far.

        Whoever stops early keeps the last Ranked. While fewer than ``num_keep`` are finished, all of them are kept.
        ``min_distance`` as in ``rerank.rank``.
        """
        parts: list[Candidates] = []
        scores: list[Tensor] = []
        for event in self.sample(prompt, indices, **options):
            if isinstance(event, Preview):
                yield event
                continue
            parts.append(event)
            scores.append(score(event.images, prompt, self.clips))
            yield ranked(join(parts), torch.cat(scores, dim=1), num_keep, min_distance)

    def generate(
        self,
        prompt: str,
        *,
        num_candidates: int,
        num_keep: int,
        min_distance: float = 0.0,
        **options: Unpack[SampleOptions],
    ) -> tuple[Candidates, Ranking]:
        """Sample, rank and keep.

        Returns:
            All candidates, and the ``num_keep`` best of them, best first.

        Raises:
            ValueError: counts out of range, or the prompt is too long.
        """
        if not 1 <= num_keep <= num_candidates:
            raise UserError(f"num_keep ({num_keep}) must lie in 1 to num_candidates ({num_candidates})")
        indices = range(num_candidates)
        *_, last = self.stream(prompt, indices, num_keep=num_keep, min_distance=min_distance, **options)
        assert isinstance(last, Ranked)  # a Preview is never the last
        return last.candidates, last.ranking


def ranked(candidates: Candidates, scores: Float[Tensor, "s m"], num_keep: int, min_distance: float) -> Ranked:
    """Candidates with their ranking; all of them are kept where there are fewer than ``num_keep``."""
    kept = min(num_keep, len(candidates.images))
    return Ranked(candidates, scores, rank(scores, candidates.images, kept, min_distance=min_distance))


def join(parts: Sequence[Candidates]) -> Candidates:
    """Candidates of several micro-batches or processes as one."""
    return Candidates(
        torch.cat([part.image_tokens for part in parts]),
        torch.cat([part.images for part in parts]),
        [index for part in parts for index in part.indices],
    )


def text_tokenizer_of(model: TextToImage | TwoTowers, kind: str) -> TextTokenizer:
    """The tokenizer a model carries.

    Raises:
        ValueError: it carries none.
    """
    if model.text_tokenizer is None:
        raise UserError(
            f"this {kind} carries no text tokenizer, so it cannot read prompts; set {kind}.text_tokenizer, "
            "or load a checkpoint that our training wrote"
        )
    return model.text_tokenizer
