"""Prompts to ranked candidates: what of an image stays, the drawing of a prompt, one ranking over all processes."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from dalle_pytorch.distributed import Processes
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.generation.generator import Candidates, Generator, Preview, Ranked, join, ranked
from dalle_pytorch.generation.results import PreviewAnimation
from dalle_pytorch.generation.strategies import KnownTokens
from dalle_pytorch.images import decode_image
from dalle_pytorch.models.image_tokenizer import margin_of, token_edges


def read_picture(path: str, size: int) -> Float[Tensor, "3 H W"]:
    """A picture as training reads it: upright, on white, its middle square.

    Raises:
        FileNotFoundError: no such file.
        UserError: not a picture that can be read; names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    return decode_image(Path(path).read_bytes(), image_size=size, name=path)


def to_complete(config: GenerateConfig, generator: Generator) -> KnownTokens | None:
    """The part of ``image`` that stays.

    Raises:
        UserError: keep_rows leaves nothing to draw, or a file cannot be read; names it.
    """
    if config.image is None:
        return None
    dalle = generator.dalle
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


GATHERED = 1024
"""Candidates at most of prompts that are drawn together: the first process holds all their images."""


class Drawn(NamedTuple):
    """What a process has of some prompts drawn together, by their number."""

    finished: dict[int, Ranked]
    films: dict[int, PreviewAnimation]
    """Of all of them; only those that this process shows have frames."""
    stopped: KeyboardInterrupt | None
    """Ctrl-C or another signal, where one ended it early."""


def groups(generator: Generator, config: GenerateConfig, processes: Processes, prompts: int) -> list[range]:
    """Numbers of the prompts that are drawn together: as many as fill a micro-batch of every process, within bounds."""
    each = max(len(config.drawn()), 1)
    # of the process with the least memory: all must cut the prompts alike
    size = min(processes.map(lambda _: generator.micro_batch(config.sampling, each), range(processes.count)))
    if each < processes.count:  # prompts are shared, see draw
        together = max(min(size, GATHERED // processes.count) // each, 1) * processes.count
    else:
        together = max(min(size * processes.count, GATHERED) // each, 1)
    return [range(first, min(first + together, prompts)) for first in range(0, prompts, together)]


def draw(
    generator: Generator,
    prompts: Sequence[str],
    numbers: range,
    config: GenerateConfig,
    given: KnownTokens | None,
    processes: Processes,
) -> Drawn:
    """Sample and rank this process's share of some prompts under a progress bar.

    A process draws some candidates of each prompt, or where there are fewer candidates than processes some prompts.
    """
    assert config.seed is not None  # a random one is drawn before, once for all processes
    some, share, shown = list(numbers), config.drawn(), config.progressive
    if len(share) < processes.count:
        some = list(processes.share(some))
    else:
        share, shown = list(processes.share(share)), shown and processes.rank == 0
    films = {number: PreviewAnimation(generator, prompts[number]) for number in numbers}
    finished: dict[int, Ranked] = {}
    title = prompts[numbers[0]][:40] if len(numbers) == 1 else f"prompts {numbers[0] + 1} to {numbers[-1] + 1}"
    total = len(some) * len(share) * generator.dalle.num_image_tokens
    with tqdm(total=total, desc=title, unit="token", unit_scale=True, disable=processes.rank > 0) as bar:
        try:
            for place, event in generator.stream_each(
                [prompts[number] for number in some],
                share,
                num_keep=config.num_keep,
                min_distance=config.min_distance,
                seed=config.seed,
                sampling=config.sampling,
                given=given,
                negative_prompt=config.negative_prompt,
                truncate=config.truncate,
                preview_rows=config.preview_rows if shown else 0,
                progress=bar.update,
            ):
                if isinstance(event, Preview):
                    films[some[place]].show(event)
                else:
                    finished[some[place]] = event
        except KeyboardInterrupt as signal:
            if processes.count > 1:
                raise
            return Drawn(finished, films, signal)
    return Drawn(finished, films, None)


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
