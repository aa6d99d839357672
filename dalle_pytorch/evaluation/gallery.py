"""The figures of a model card, none of them picked by eye.

``seen`` and ``held_out`` draw captions of both splits, beside the real image; ``completion`` goes on from the upper
half of held-out images; ``guidance`` and ``ranking`` show what guidance and the CLIP change; ``00_a-red-apple``, … are
a sheet for each prompt, ranked and unranked. ``seed`` draws images and captions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.splits import open_splits
from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.evaluation.completion import CompletionConfig
from dalle_pytorch.evaluation.samples import Samples, read_samples
from dalle_pytorch.generation.config import read_prompts
from dalle_pytorch.generation.generator import Candidates, Generator
from dalle_pytorch.generation.grid import GridRow
from dalle_pytorch.generation.results import file_stem
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import KnownTokens
from dalle_pytorch.models.image_tokenizer import margin_of

SHOWN = 2
"""Prompts in the figures of guidance and ranking."""
CELL = 96
"""Side of a drawn picture in pixels."""


@dataclass(kw_only=True)
class GalleryConfig:
    """What draws, what ranks, and how much of it is shown."""

    weights: str = "emoji"
    """A DALLE, as generate.py takes it."""
    clip: str = "emoji"
    """What ranks, as generate.py takes it."""
    data: DataConfig = field(default_factory=DataConfig)
    """train_split gives the captions of seen.png, val_split those of held_out.png and what is completed."""
    caption: int = 1
    """Which of a picture's captions is read, from 0; its last where there are fewer. 1 has emoji's styles."""
    prompts_file: str = "weights/emoji/prompts.txt"
    """Text file with a prompt a line, of the sheets; guidance.png and ranking.png show the first two."""
    rows: int = 4
    """Captions of seen.png, held_out.png and completion.png."""
    num_candidates: int = 64
    """Pictures drawn for each caption."""
    num_keep: int = 8
    """Pictures shown of them."""
    guidance: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0])
    """Values of sampling.cfg_scale in guidance.png."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How all the others are drawn."""
    seed: int = 0
    """Of the choice of captions and of the candidates."""
    out: str = "???"
    """Folder to make; it must not hold files yet."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: counts that do not fit; names them.
        """
        at_least_one(self, "rows")
        if not 1 <= self.num_keep <= self.num_candidates:
            raise UserError(f"num_keep ({self.num_keep}) must lie in 1 to num_candidates ({self.num_candidates})")


class Drawn(NamedTuple):
    """Candidates of a prompt."""

    candidates: Candidates
    order: list[int]
    """Their places from best to worst."""
    labels: list[str]
    """Of each: its index and its score."""


@dataclass(frozen=True)
class Artist:
    """Draws the rows of figures."""

    generator: Generator
    config: GalleryConfig

    def draw(
        self,
        prompt: str,
        *,
        given: KnownTokens | None = None,
        sampling: SamplingConfig | None = None,
        count: int | None = None,
    ) -> Drawn:
        """The first ``count`` candidates of a prompt; None = all."""
        count = count or self.config.num_candidates
        candidates, ranking = self.generator.generate(
            prompt, num_candidates=count, num_keep=count, seed=self.config.seed,
            sampling=sampling or self.config.sampling, given=given,
        )  # fmt: skip
        assert ranking.all_scores is not None  # a CLIP ranks
        labels = [f"#{index}  {score:.3f}" for index, score in enumerate(ranking.all_scores.tolist())]
        return Drawn(candidates, ranking.indices.tolist(), labels)

    def row(self, title: str, candidates: Candidates, labels: Sequence[str], places: Sequence[int]) -> GridRow:
        """The candidates at some places."""
        return GridRow(title, [candidates.images[i] for i in places], [labels[i] for i in places])

    def beside_real(self, samples: Samples) -> list[GridRow]:
        """The best candidates of each caption after the real picture."""
        rows = []
        for caption, image in zip(samples.captions, samples.images, strict=True):
            candidates, order, labels = self.draw(caption)
            best = self.row(caption, candidates, labels, order[: self.config.num_keep])
            rows.append(GridRow(caption, [image, *best.images], ["real", *best.labels]))
        return rows

    def completions(self, samples: Samples) -> list[GridRow]:
        """Each picture, its upper half, and the best of what goes on from there."""
        rows = []
        dalle = self.generator.dalle
        (part,) = CompletionConfig(rows=[0.5]).parts(dalle.grid_size, margin_of(dalle.vae)).values()
        for caption, image in zip(samples.captions, samples.images, strict=True):
            candidates, order, labels = self.draw(caption, given=self.generator.given(image, part.keep()))
            best = self.row(caption, candidates, labels, order[: self.config.num_keep])
            rows.append(
                GridRow(caption, [image, part.without(image[None])[0], *best.images], ["real", "given", *best.labels])
            )
        return rows

    def guided(self, prompt: str) -> list[GridRow]:
        """The first candidates, unranked, at each guidance scale."""
        rows, count = [], self.config.num_keep
        for scale in self.config.guidance:
            sampling = replace(self.config.sampling, cfg_scale=scale)
            candidates, _, labels = self.draw(prompt, sampling=sampling, count=count)
            rows.append(self.row(f"{prompt}: cfg_scale={scale:g}, unranked", candidates, labels, range(count)))
        return rows

    def best_and_worst(self, prompt: str, drawn: Drawn) -> list[GridRow]:
        """Both ends of the ranking."""
        candidates, order, labels = drawn
        kept, count = self.config.num_keep, self.config.num_candidates
        return [
            self.row(f"{prompt}: best of {count}", candidates, labels, order[:kept]),
            self.row(f"{prompt}: worst of {count}", candidates, labels, order[-kept:]),
        ]

    def sheet(self, prompt: str, drawn: Drawn) -> list[GridRow]:
        """The best candidates, and the first ones as they came."""
        candidates, order, labels = drawn
        kept, count = self.config.num_keep, self.config.num_candidates
        return [
            self.row(f"{prompt}: best {kept} of {count}", candidates, labels, order[:kept]),
            self.row(f"{prompt}: first {kept}, unranked", candidates, labels, range(kept)),
        ]

    def figures(self) -> Iterator[tuple[str, list[GridRow]]]:
        """Name and rows of every figure, drawn one after the other; what cannot be drawn is refused before.

        Raises:
            UserError: a prompt or caption is longer than the model's context, or guidance of a model without.
        """
        config, size = self.config, self.generator.dalle.vae.image_size
        prompts = read_prompts(config.prompts_file)
        seen, held_out = (
            read_samples(shards, config.data, size, most=config.rows, seed=config.seed, caption=config.caption)
            for shards in open_splits(config.data)
        )
        for scale in (config.sampling.cfg_scale, *config.guidance):
            sampling = replace(config.sampling, cfg_scale=scale)
            self.generator.check([*prompts, *seen.captions, *held_out.captions], sampling)
        yield "seen", self.beside_real(seen)
        yield "held_out", self.beside_real(held_out)
        yield "completion", self.completions(held_out)
        yield "guidance", [row for prompt in prompts[:SHOWN] for row in self.guided(prompt)]
        ranking: list[GridRow] = []
        for number, prompt in enumerate(prompts):
            drawn = self.draw(prompt)
            yield file_stem(number, prompt), self.sheet(prompt, drawn)
            ranking += self.best_and_worst(prompt, drawn) if number < SHOWN else []
        yield "ranking", ranking
