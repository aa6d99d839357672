"""What a server asks of the models, and the models of this process that answer.

Axes: b images, n image tokens, c channels, H W pixels.
"""

import functools
import io
from collections.abc import Callable, Sequence
from collections.abc import Generator as GeneratorType
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from PIL import Image

from dalle_pytorch.checkpoints.checkpoint import weights_sha256
from dalle_pytorch.checkpoints.loading import load, load_scorer
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.generator import Generator, Preview, Ranked
from dalle_pytorch.generation.grid import partial_picture
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import KnownTokens
from dalle_pytorch.images import fit, to_pil, to_tensor
from dalle_pytorch.models.image_tokenizer import margin_of
from dalle_pytorch.models.two_towers import TwoTowers

PREVIEWED = 8
"""Images of a job in its preview."""


@dataclass(kw_only=True, frozen=True)
class Draw:
    """A request for images of one prompt."""

    prompt: str
    seed: int
    indices: tuple[int, ...]
    """Candidates to draw: each is a function of (prompt, seed, index)."""
    keep: int
    """The best of them that are kept."""
    sampling: SamplingConfig
    negative_prompt: str = ""
    image: Image.Image | None = None
    """An image to complete."""
    keep_rows: int = 0
    """Token rows of it that stay, from the top."""


class Step(NamedTuple):
    """A request is so far."""

    number: int
    progress: float
    preview: Callable[[], bytes]
    """Makes a PNG of the first images side by side; only when asked, since it takes as long as some steps."""


class Drawn(NamedTuple):
    """A request is finished: the images that are kept, the best first."""

    number: int
    images: list[tuple[Image.Image, int, float | None]]
    """Each with its index and its score."""


Generated: TypeAlias = GeneratorType[Step | Drawn, None, None]


@runtime_checkable
class Engine(Protocol):
    """Models that answer."""

    model: str
    """Hash of the weights that draw."""
    image_size: int
    vae: Any
    """The image tokenizer, for the codec."""
    clip: TwoTowers | None
    """Searches the library by meaning."""
    together: int
    """Images that are drawn in one go."""

    def check(self, request: Draw) -> None:
        """Refuse what cannot be drawn.

        Raises:
            UserError: says why.
        """
        ...

    def draw(self, requests: Sequence[Draw]) -> Generated:
        """Draw requests that differ in prompt, seed and image only; closing it stops."""
        ...


class LocalEngine:
    """Models in this process, loaded once.

    Args:
        weights: of the DALLE, as ``load`` finds them.
        clip: what ranks, several with | between them; None = nothing.
        device: where.
        precision: as ``Generator``.
        memory_gb: as ``Generator``.
        together: images that are drawn in one go at most.
    """

    def __init__(
        self,
        weights: str,
        clip: str | None = None,
        *,
        device: torch.device,
        precision: str | None = None,
        memory_gb: float | None = None,
        together: int = 64,
    ) -> None:
        dalle = load(weights, kind="dalle").to(device)
        scorers = [load_scorer(name.strip(), device) for name in (clip or "").split("|") if name.strip()]
        self.model = weights_sha256(dalle)
        self.generator = Generator(dalle, scorers, precision=precision, memory_gb=memory_gb)
        self.vae, self.image_size, self.together = dalle.vae, dalle.vae.image_size, together
        self.clip = next((scorer for scorer in scorers if isinstance(scorer, TwoTowers)), None)

    def check(self, request: Draw) -> None:
        """As Engine says."""
        self.generator.check([request.prompt], request.sampling, seed=request.seed)
        if request.negative_prompt:
            self.generator.check([request.negative_prompt])
            if not request.sampling.guided():
                raise UserError("negative_prompt acts through guidance: set cfg_scale above 1")
        grid = self.generator.dalle.grid_size
        if request.keep_rows >= grid:
            raise UserError(
                f"rows must lie in 1 to {grid - 1}: an image has {grid} token rows, got {request.keep_rows}"
            )

    def draw(self, requests: Sequence[Draw]) -> Generated:
        """As Engine says. Out of memory, the batch is halved; what is drawn does not change."""
        first, usual, finished = requests[0], self.generator.batch_size, set[int]()
        size = min(self.generator.micro_batch(first.sampling), len(first.indices) * len(requests))
        try:
            while True:
                try:
                    for event in self._draw(requests):
                        if event.number not in finished:
                            if isinstance(event, Drawn):
                                finished.add(event.number)
                            yield event
                    return
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    self.generator.batch_size = size = size // 2
                    torch.cuda.empty_cache()
        finally:
            self.generator.batch_size = usual

    def _draw(self, requests: Sequence[Draw]) -> Generated:
        first, count = requests[0], self.generator.dalle.num_image_tokens
        total, at = len(first.indices), dict.fromkeys(range(len(requests)), 0.0)
        for number, event in self.generator.stream_each(
            [request.prompt for request in requests], first.indices, num_keep=first.keep,
            seed=[request.seed for request in requests], sampling=first.sampling,
            negative_prompt=first.negative_prompt, preview_rows=1, given=self.given(requests),
        ):  # fmt: skip
            if isinstance(event, Preview):
                share = len(event.indices) / total * event.done / count
                yield Step(number, min(at[number] + share, 1.0), functools.partial(self.preview, event))
                continue
            at[number] = len(event.candidates.indices) / total
            if at[number] == 1:
                yield Drawn(number, kept(event))

    def given(self, requests: Sequence[Draw]) -> KnownTokens | None:
        """The tokens that stay of the images to complete."""
        dalle, rows, images = self.generator.dalle, requests[0].keep_rows, [request.image for request in requests]
        if not rows:
            return None
        keep = torch.arange(dalle.num_image_tokens) < rows * dalle.grid_size
        pixels = [to_tensor(fit(image.convert("RGB"), self.image_size)) for image in images if image is not None]
        return KnownTokens(torch.cat([self.generator.given(each, keep).tokens for each in pixels]), keep)

    def preview(self, event: Preview) -> bytes:
        """The first images of a micro-batch side by side, what is not drawn yet in grey."""
        grid, margin = self.generator.dalle.grid_size, margin_of(self.vae)
        pictures = [
            to_pil(partial_picture(self.generator.decode, row, event.done, grid, margin))
            for row in event.image_tokens[:PREVIEWED]
        ]
        sheet = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
        for place, picture in enumerate(pictures):
            sheet.paste(picture, (place * picture.width, 0))
        return png(sheet)


def kept(result: Ranked) -> list[tuple[Image.Image, int, float | None]]:
    """The best images of a ranking, each with its index and its score."""
    scores: Any = result.ranking.scores
    return [
        (
            to_pil(result.candidates.images[at]),
            result.candidates.indices[at],
            None if scores is None else round(float(scores[place]), 4),
        )
        for place, at in enumerate(result.ranking.indices.tolist())
    ]


def png(image: Image.Image) -> bytes:
    """A PNG file."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


MakeEngine = Callable[[], Engine]
