"""Prompts to ranked pictures: ``generate.py prompt="a red apple" dalle=... clip=... num_candidates=64 num_keep=8``.

Without a model of one's own it draws with the weights that come along (``weights=emoji clip=emoji experiment=emoji``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.config import entry
from dalle_pytorch.distributed import Processes
from dalle_pytorch.errors import ConfigError, UserError
from dalle_pytorch.files import split_lines
from dalle_pytorch.generation.engine import AnyDALLE, Given
from dalle_pytorch.generation.generator import Candidates, Generator, Preview, Ranked, join, ranked
from dalle_pytorch.generation.results import Film, Results, file_stem
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.images import decode_image
from dalle_pytorch.models.image_tokenizer import margin_of, token_edges

RELEASED = {
    "weights=emoji": ("weights", "dalle"),
    "clip=emoji": ("weights", "dalle", "clip"),
    "experiment=emoji": ("weights", "dalle", "experiment"),
}
"""Without a model of one's own: the weights that come along, in the settings of their card."""


@dataclass(kw_only=True)
class GenerateConfig:
    """What to draw, with which models, and where to put it."""

    prompt: str | None = None
    """One prompt, or several with | between them."""
    prompts_file: str | None = None
    """Text file with a prompt a line, in place of ``prompt``."""
    weights: str | None = None
    """What draws: a checkpoint of a DALLE, which carries its image and text tokenizers, or another program's weights: a
    file, a folder, the name of a release or an id of the Hugging Face hub (docs/weights.md). Without weights and dalle:
    emoji, those that come along, with their clip and experiment=emoji."""
    dalle: str | None = None
    """The same under another name."""
    clip: str | None = None
    """The CLIP that ranks, found in the same ways, or several with | between them, which vote; null = the candidates
    keep their order."""
    num_candidates: int = 64
    """Pictures drawn for each prompt (the paper: 512)."""
    num_keep: int = 8
    """Pictures kept for each prompt."""
    min_distance: float = 0.0
    """Keep no two pictures nearer than this (root mean square of pixels in [0, 1]), if there are others; 0 = off."""
    indices: list[int] | None = None
    """Draw these candidates only, in place of the first num_candidates: an index of ranking.json draws that picture
    again."""
    seed: int = 0
    """The same seed gives the same pictures."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Temperature, truncation and guidance."""
    negative_prompt: str = ""
    """What guidance leads away from; nothing = the empty caption."""
    image: str | None = None
    """Picture to complete, with keep_rows or keep_mask."""
    keep_rows: int = 0
    """Token rows of ``image`` that stay, from the top."""
    keep_mask: str | None = None
    """Black-and-white picture: where it is white, ``image`` stays (a token stays if all of it is white)."""
    progressive: bool = False
    """Also write an animation of each prompt's pictures as they appear."""
    preview_rows: int = 1
    """Token rows between two frames of the animation."""
    batch_size: int | None = None
    """Candidates sampled together: memory and speed, not the result; null = what memory_gb holds."""
    memory_gb: float = 4.0
    """Memory for the keys and values of candidates, in 10^9 bytes, for each process."""
    precision: str = "fp32"
    """Arithmetic of the DALLE: fp32, bf16, fp16 or int8 (CPU). Faster, and other pictures."""
    compile: bool = False
    """Translate a step with torch.compile: half a minute the first time; pays with precision=int8."""
    truncate: bool = False
    """Cut prompts longer than the model's context instead of refusing them."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ..."""
    out: str = "???"
    """Folder to make; it must not hold files yet."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: counts that do not fit; names them.
        """
        if self.weights is not None and self.dalle is not None:
            raise UserError(f"weights={self.weights} and dalle={self.dalle} mean the same: give one")
        if not 1 <= self.num_keep <= self.num_candidates:
            raise UserError(f"num_keep ({self.num_keep}) must lie in 1 to num_candidates ({self.num_candidates})")
        if not 0 <= self.min_distance <= 1:
            raise UserError(f"min_distance must lie in [0, 1] (0 = off), got {self.min_distance}")
        if self.preview_rows < 1:
            raise UserError(f"preview_rows must be at least 1, got {self.preview_rows}")
        if self.indices is not None and (
            len(set(self.indices)) < len(self.indices) or min(self.indices, default=-1) < 0
        ):
            raise UserError(f"indices must be different numbers from 0 on, got {self.indices}")
        if (self.image is None) == bool(self.keep_rows or self.keep_mask) or (self.keep_rows and self.keep_mask):
            raise UserError("completion needs image=FILE and one of keep_rows=ROWS and keep_mask=FILE")

    def model(self) -> str:
        """Where the model is.

        Raises:
            ConfigError: not given.
        """
        if (found := self.weights or self.dalle) is None:
            raise ConfigError("weights= is missing: what draws, a checkpoint, folder or name (dalle= means the same)")
        return found

    def drawn(self) -> list[int]:
        """Numbers of the candidates of each prompt."""
        return list(range(self.num_candidates)) if self.indices is None else list(self.indices)

    def prompts(self) -> list[str]:
        """The prompts, from the setting or the file.

        Raises:
            ValueError: none given, or both ways at once.
            FileNotFoundError: no such file.
        """
        if (self.prompt is None) == (self.prompts_file is None):
            raise UserError('give the prompts one way: prompt="a red apple|a blue car" or prompts_file=FILE')
        lines = self.prompt.split("|") if self.prompt is not None else read_lines(str(self.prompts_file))
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError("there is no prompt in what was given: every line is empty")
        return prompts


def read_lines(prompts_file: str) -> list[str]:
    """The lines of a file of prompts.

    Raises:
        FileNotFoundError: no such file.
    """
    path = Path(prompts_file)
    if not path.is_file():
        raise FileNotFoundError(f"prompts_file={path} does not exist")
    return split_lines(path.read_text(encoding="utf-8"))


def read_picture(path: str, size: int) -> Float[Tensor, "3 H W"]:
    """A picture as training reads it: upright, on white, its middle square.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a picture that can be read; names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return decode_image(Path(path).read_bytes(), image_size=size, name=path)


def to_complete(config: GenerateConfig, generator: Generator, dalle: AnyDALLE) -> Given | None:
    """The part of ``image`` that stays.

    Raises:
        ValueError: keep_rows leaves nothing to draw, or a file cannot be read; names it.
    """
    if config.image is None:
        return None
    grid, size = dalle.grid_size, dalle.vae.image_size
    picture = read_picture(config.image, size)
    if config.keep_mask is not None:
        mask = read_picture(config.keep_mask, size).mean(dim=0)
        lines = list(pairwise(token_edges(size, grid, margin_of(dalle.vae))))
        keep = torch.tensor([bool(mask[a:b, c:d].min() > 0.5) for a, b in lines for c, d in lines])
        if not keep.any():
            raise UserError(f"keep_mask={config.keep_mask} keeps no token: a token stays only if all of it is white")
    else:
        if not 0 < config.keep_rows < grid:
            raise UserError(
                f"keep_rows must lie in 1 to {grid - 1} (the picture has {grid} token rows), got {config.keep_rows}"
            )
        keep = torch.arange(grid**2) < config.keep_rows * grid
    if keep.all():
        raise UserError(f"keep_mask={config.keep_mask} keeps every token: there is nothing to draw")
    return generator.given(picture, keep)


def draw(
    generator: Generator, prompt: str, config: GenerateConfig, given: Given | None, processes: Processes
) -> tuple[Ranked | None, Film, bool]:
    """Sample and rank this process's share of one prompt under a progress bar.

    Returns:
        What was finished, None if nothing; the frames; whether Ctrl-C ended it early.
    """
    share, film, finished = processes.share(config.drawn()), Film(generator, prompt), None
    total = len(share) * generator.dalle.num_image_tokens
    with tqdm(total=total, desc=prompt[:40], unit="token", unit_scale=True, disable=processes.rank > 0) as bar:
        try:
            for event in generator.stream(
                prompt,
                share,
                num_keep=config.num_keep,
                min_distance=config.min_distance,
                seed=config.seed,
                sampling=config.sampling,
                given=given,
                negative_prompt=config.negative_prompt,
                truncate=config.truncate,
                preview_rows=config.preview_rows if config.progressive and processes.rank == 0 else 0,
                progress=bar.update,
            ):
                if isinstance(event, Preview):
                    film.show(event)
                else:
                    finished = event
        except KeyboardInterrupt:
            if processes.count > 1:
                raise
            return finished, film, True
    return finished, film, False


def merge(shares: Sequence[Ranked | None], config: GenerateConfig) -> Ranked | None:
    """One ranking of what all processes drew, candidates in index order; None if nothing was finished."""
    found = [share for share in shares if share is not None]
    if not found:
        return None
    candidates = join([share.candidates for share in found])
    scores = torch.cat([share.scores for share in found], dim=1)
    place = {index: at for at, index in enumerate(config.drawn())}
    order = torch.tensor(sorted(range(len(candidates.indices)), key=lambda at: place[candidates.indices[at]]))
    candidates = Candidates(
        candidates.image_tokens[order], candidates.images[order], [candidates.indices[at] for at in order.tolist()]
    )
    return ranked(candidates, scores[:, order], config.num_keep, config.min_distance)


@entry("generate", GenerateConfig)
def main(config: GenerateConfig) -> None:
    """Sample, rank, write PNGs, ``grid.png`` and ``ranking.json``; Ctrl-C of a lone process keeps what is finished."""
    prompts, processes = config.prompts(), Processes()
    try:
        device = processes.device(config.device)
        dalle = load(config.model(), kind="dalle").to(device)
        clips = [load(path.strip(), kind="clip").to(device) for path in (config.clip or "").split("|") if path.strip()]
        generator = Generator(
            dalle,
            clips,
            batch_size=config.batch_size,
            memory_gb=config.memory_gb,
            precision=config.precision,
            compiled=config.compile,
        )
        generator.check(prompts, config.sampling, truncate=config.truncate)
        given = to_complete(config, generator, dalle)
        results = Results(config) if processes.rank == 0 else None
        for number, prompt in enumerate(prompts):
            share, film, cancelled = draw(generator, prompt, config, given, processes)
            result = merge(processes.gather(share), config)
            if results is not None and result is not None:
                results.add(file_stem(number, prompt), prompt, result, film)
            if cancelled:
                break
        if results is not None:
            results.finish(cancelled)
    finally:
        processes.close()


if __name__ == "__main__":
    main()
