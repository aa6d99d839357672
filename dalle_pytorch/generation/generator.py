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
from dalle_pytorch.generation.strategies import KnownTokens, check_strategy, draw_image_tokens, find_strategy
from dalle_pytorch.models.text_to_image import TextToImage
from dalle_pytorch.models.two_towers import TwoTowers
from dalle_pytorch.text import TextTokenizer

CPU_ROWS, GPU_ROWS = 512, 2048
"""Candidates drawn together at most, guidance's twins included: more of them take as long each."""
CPU_MEMORY_GB = 4.0
GPU_SHARE = 0.7
"""Part of a GPU's free memory that the caches of candidates may take."""
DECODED_TOGETHER = 32
"""Images in one call of the image tokenizer: its activations are far larger than its output."""


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

    seed: int | Sequence[int]
    """Another seed gives other candidates; 0. Several: one for each prompt."""
    sampling: SamplingConfig | None
    """Temperature, truncation and guidance; None = as the model is."""
    given: KnownTokens | None
    """Image tokens that stay as they are; None = none."""
    negative_prompt: str
    """What guidance leads away from; "" = the empty caption."""
    truncate: bool
    """Cut a prompt longer than the context instead of raising; False."""
    preview_rows: int
    """Give a Preview after so many token rows each; 0 = none. There are none of a random order, which has no rows."""
    progress: Callable[[int], object]
    """Called with the number of image tokens that have just been drawn."""


class Generator:
    """A DALLE with its text tokenizer and, for ranking, one scorer or several.

    Args:
        dalle: a model whose ``text_tokenizer`` is set, as training and ``load`` leave it. Its weights are laid out for
            sampling here: make another Generator after training on.
        clip: ranks the candidates, a CLIP or any ``rerank.Scorer``; several vote; None = they keep their order and
            have no score.
        batch_size: candidates sampled together, of one prompt or of several; None = as many as ``memory_gb`` holds.
            Memory and speed, not the images.
        memory_gb: memory for the keys and values of candidates, in 10^9 bytes; None = 4 on a CPU, most of what is free
            on a GPU.
        precision: arithmetic of the DALLE's linear layers, "fp32", "bf16", "fp16" or "int8" (CPU); None = "bf16" on a
            GPU that has it, else "fp32". Faster, and other images.
        compiled: translate a step with torch.compile, which takes half a minute the first time; pays with int8. On a
            CPU it needs a C++ compiler, and keys and values have another type: other images.

    Raises:
        ValueError: a model without a text tokenizer, a ranker that is no Scorer, or settings out of range.
    """

    def __init__(
        self,
        dalle: TextToImage,
        clip: Scorer | Sequence[Scorer] | None = None,
        *,
        batch_size: int | None = None,
        memory_gb: float | None = None,
        precision: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.dalle, self.batch_size = dalle, batch_size
        self.clips = as_scorers(clip)
        self.tokenizer = text_tokenizer_of(dalle, "dalle")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        if memory_gb is not None and not memory_gb > 0:
            raise UserError(f"memory_gb must be positive, got {memory_gb}")
        device = next(dalle.parameters()).device
        self.decoder = Decoder(dalle, precision=precision or best_precision(device), compiled=compiled)
        self.memory_gb = memory_gb or free_memory_gb(device)

    def check(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig | None = None,
        *,
        seed: int | Sequence[int] = 0,
        truncate: bool = False,
    ) -> None:
        """Refuse what cannot be drawn, before time is spent on the first prompt.

        Raises:
            UserError: a prompt that is no text or is longer than the model's context (shows it), a seed that is no
                integer, several that are not one for each prompt, an unknown strategy, or guidance of a model that
                never saw an empty caption.
        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UserError(
                    f"a prompt must be a text, got {prompt!r}; generate() takes one, sample_each() and stream_each() "
                    "take several"
                )
            self.tokenizer.tokenize(prompt, self.dalle.config.text_len, truncate=truncate)
        seeds = [seed] if isinstance(seed, int) else seed
        if not isinstance(seeds, Sequence) or not all(isinstance(item, int) for item in seeds):
            raise UserError(f"seed must be an integer, got {seed!r}")
        if len(seeds) not in (1, len(prompts)):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: one, or one for each")
        if sampling is not None:
            check_strategy(sampling, self.dalle)
        if sampling is not None and sampling.guided() and not self.dalle.config.caption_dropout:
            raise UserError(
                f"guidance (cfg_scale={sampling.cfg_scale}, cfg_schedule={sampling.cfg_schedule}) needs a model that "
                "has seen empty captions; this one was trained with caption_dropout=0: use cfg_scale=1"
            )

    def micro_batch(self, sampling: SamplingConfig, candidates: int | None = None) -> int:
        """Candidates drawn together: ``batch_size``, or what the memory holds, at least one.

        Args:
            sampling: guidance doubles the memory, and speculation adds to it.
            candidates: of each prompt, which share what the prompt takes; None = so many that it does not count.
        """
        if self.batch_size is not None:
            return self.batch_size
        twins = 2 if sampling.guided() else 1
        each = self.decoder.bytes_per_candidate(window=find_strategy(sampling.strategy).window(sampling))
        if candidates is not None:
            each += self.decoder.bytes_per_prompt() // max(candidates, 1)
        rows = min(int(self.memory_gb * 1e9) // each, CPU_ROWS if self.decoder.device.type == "cpu" else GPU_ROWS)
        return max(rows // twins, 1)

    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Images of image tokens, on the CPU.

        Raises:
            UserError: they are not finite.
        """
        with torch.no_grad():
            parts = image_tokens.to(self.decoder.device).split(DECODED_TOGETHER)
            images = torch.cat([self.dalle.vae.decode(part).float().cpu() for part in parts])
        if not images.isfinite().all():
            raise UserError("the image tokenizer decodes to NaN or infinity: its weights are damaged")
        return images

    def given(self, image: Float[Tensor, "c H W"], keep: Bool[Tensor, " n"]) -> KnownTokens:
        """A picture's image tokens, of which some stay.

        Args:
            image: RGB in [0, 1], of the model's size.
            keep: True = the token stays, in raster order.
        """
        with torch.no_grad():
            return KnownTokens(self.dalle.vae.encode(image[None].to(self.decoder.device)).cpu(), keep)

    def sample_each(
        self,
        prompts: Sequence[str],
        indices: Sequence[int],
        *,
        seed: int | Sequence[int] = 0,
        sampling: SamplingConfig | None = None,
        given: KnownTokens | None = None,
        negative_prompt: str = "",
        truncate: bool = False,
        preview_rows: int = 0,
        progress: Callable[[int], object] = lambda drawn: None,
    ) -> Iterator[tuple[int, Preview | Candidates]]:
        """Sample candidates of several prompts, a micro-batch after the other.

        Prompts with few candidates share a micro-batch. A candidate is still a function of (prompt, seed, index).
        Closing the iterator frees what the unfinished micro-batch holds.

        Args:
            prompts: what to draw.
            indices: which candidates of each prompt, for instance ``range(64)``; none of them gives nothing.
            seed: this and the others: see SampleOptions.

        Yields:
            The number of a prompt, and candidates of it, all that a micro-batch has of it at once.

        Raises:
            UserError: a prompt is longer than the context, or guidance of a model that never saw an empty one.
        """
        sampling = sampling or SamplingConfig()
        self.check(prompts, sampling, seed=seed, truncate=truncate)
        if sampling.temperature == 0 and len(indices) > 1:
            warnings.warn(
                f"temperature=0 makes all {len(indices)} candidates of a prompt equal; use a positive one", stacklevel=2
            )
        if negative_prompt and not sampling.guided():
            raise UserError(f"negative_prompt={negative_prompt!r} acts through guidance: set cfg_scale above 1")
        seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
        length, tokens_each, device = self.dalle.config.text_len, self.dalle.num_image_tokens, self.decoder.device
        null = self.tokenizer.tokenize(negative_prompt, length, truncate=truncate)
        if given is not None and len(given.tokens) not in (1, len(prompts)):
            raise UserError(
                f"given tokens of {len(given.tokens)} images for {len(prompts)} prompts: one, or one for each"
            )
        size = self.micro_batch(sampling, len(indices))
        if find_strategy(sampling.strategy).order is not None:
            preview_rows = 0
        for numbers, part in micro_batches(len(prompts), list(indices), size):
            drawn, wanted = list(numbers), part
            if self.decoder.compiled:  # fill up: another number of rows would be another program to translate
                drawn, wanted = fill_up(drawn, part, len(prompts), len(indices), size)
            some = [prompts[number] for number in drawn]
            text = torch.cat([self.tokenizer.tokenize(prompt, length, truncate=truncate) for prompt in some])
            uniforms = [
                candidate_uniforms(prompts[number], seeds[number], index, tokens_each)
                for number in drawn
                for index in wanted
            ]
            known = None if given is None else given._replace(tokens=given.tokens.expand(len(prompts), -1)[drawn])
            events = draw_image_tokens(
                self.decoder, text.to(device), torch.stack(uniforms).to(device), sampling, known,
                null.expand(len(drawn), -1).to(device),
            )  # fmt: skip
            done, tokens = 0, torch.empty(0)
            for now, tokens in events:
                progress((now - done) * len(numbers) * len(part))
                rows_before, done = done // self.dalle.grid_size, now
                shown = preview_rows and now // self.dalle.grid_size // preview_rows > rows_before // preview_rows
                if shown and now < tokens_each:
                    for number, own in zip(numbers, tokens.unflatten(0, (len(drawn), -1)), strict=False):
                        yield number, Preview(own[: len(part)].cpu().clone(), now, part)
            each = tokens.unflatten(0, (len(drawn), -1))[: len(numbers), : len(part)]
            images = self.decode(each.flatten(0, 1)).unflatten(0, each.shape[:2])
            for number, own, own_images in zip(numbers, each.cpu(), images, strict=True):
                yield number, Candidates(own, own_images, part)

    def sample(
        self, prompt: str, indices: Sequence[int], **options: Unpack[SampleOptions]
    ) -> Iterator[Preview | Candidates]:
        """``sample_each`` of one prompt."""
        return (event for _, event in self.sample_each([prompt], indices, **options))

    def candidates(self, prompt: str, indices: Sequence[int], **options: Unpack[SampleOptions]) -> Candidates:
        """All of ``sample`` at once.

        Raises:
            ValueError: no indices; and as ``sample``.
        """
        if not indices:
            raise UserError("indices is empty: there is nothing to draw")
        return join([part for part in self.sample(prompt, indices, **options) if isinstance(part, Candidates)])

    def stream_each(
        self,
        prompts: Sequence[str],
        indices: Sequence[int],
        *,
        num_keep: int,
        min_distance: float = 0.0,
        **options: Unpack[SampleOptions],
    ) -> Iterator[tuple[int, Preview | Ranked]]:
        """Sample and rank; after every micro-batch the ranking of all candidates of its prompts so far.

        Whoever stops early keeps each prompt's last Ranked. While fewer than ``num_keep`` are finished, all of them are
        kept. ``min_distance`` as in ``rerank.rank``.
        """
        parts: list[Candidates] = []
        scores: list[Tensor] = []
        current = -1
        for number, event in self.sample_each(prompts, indices, **options):
            if isinstance(event, Preview):
                yield number, event
                continue
            if number != current:  # a prompt's candidates come one after the other
                current, parts, scores = number, [], []
            parts.append(event)
            scores.append(score(event.images, prompts[number], self.clips))
            yield number, ranked(join(parts), torch.cat(scores, dim=1), num_keep, min_distance)

    def stream(
        self,
        prompt: str,
        indices: Sequence[int],
        *,
        num_keep: int,
        min_distance: float = 0.0,
        **options: Unpack[SampleOptions],
    ) -> Iterator[Preview | Ranked]:
        """``stream_each`` of one prompt."""
        events = self.stream_each([prompt], indices, num_keep=num_keep, min_distance=min_distance, **options)
        return (event for _, event in events)

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


def micro_batches(prompts: int, indices: list[int], size: int) -> Iterator[tuple[range, list[int]]]:
    """Numbers of prompts, and which candidates of each are drawn together: at most ``size`` in all, or one.

    Either several prompts with all their candidates, or some candidates of one.
    """
    if not indices:
        return
    together = max(size // len(indices), 1)
    for first in range(0, prompts, together):
        for at in range(0, len(indices), size):
            yield range(first, min(first + together, prompts)), indices[at : at + size]


def fill_up(
    numbers: list[int], part: list[int], prompts: int, candidates: int, size: int
) -> tuple[list[int], list[int]]:
    """Numbers of prompts, and candidates of each, repeated to the shape of the first of ``micro_batches``."""
    together = min(max(size // candidates, 1), prompts)
    numbers = numbers + numbers[:1] * (together - len(numbers))
    return numbers, part + part[:1] * (min(size, candidates) - len(part))


def best_precision(device: torch.device) -> str:
    """bf16 on a GPU that computes in it, else fp32."""
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def free_memory_gb(device: torch.device) -> float:
    """What the caches of candidates may take on a device, in 10^9 bytes."""
    if device.type != "cuda":
        return CPU_MEMORY_GB
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch gives it out again
    return GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + kept) / 1e9


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
