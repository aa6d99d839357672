"""What generate.py writes: images, their grid, an animation of how they appeared, and ``ranking.json``.

Axes: c channels, H W pixels.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dalle_pytorch.files import atomic, make_folder, write_new
from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.generation.generator import Generator, Preview, Ranked
from dalle_pytorch.generation.grid import GridRow, partial_picture, picture_grid, save_animation, save_png
from dalle_pytorch.images import to_pil
from dalle_pytorch.models.image_tokenizer import margin_of

SHOWN = 8
"""Pictures in the animated preview."""
INDEX_EVERY = 1 / 64
"""Share of the prompts that ``ranking.json`` may lack until it is written anew: it grows with them."""


def file_stem(number: int, prompt: str) -> str:
    """A file name that begins with the prompt's number and hints at its words."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return f"{number:02d}_{words[:40].strip('-')}".rstrip("_")


def describe(result: Ranked, stem: str) -> list[dict[str, Any]]:
    """A row of ``ranking.json`` for each kept candidate."""
    candidates, ranking, rows = result.candidates, result.ranking, []
    for place, at in enumerate(ranking.indices.tolist()):
        row: dict[str, Any] = {"rank": place, "index": candidates.indices[at], "score": None}
        if ranking.scores is not None:
            row["score"] = round(ranking.scores[place].item(), 4)
        if len(result.scores) > 1:
            row["scores"] = [round(score, 4) for score in result.scores[:, at].tolist()]
        row["file"] = f"{stem}_{place:02d}.png"
        row["image_tokens"] = candidates.image_tokens[at].tolist()
        rows.append(row)
    return rows


def label(row: dict[str, Any]) -> str:
    """What stands under a picture of the grid: its index and its score."""
    return f"#{row['index']}" if row["score"] is None else f"#{row['index']}  {row['score']:.3f}"


class PreviewAnimation:
    """Frames of a prompt's pictures as they appear."""

    def __init__(self, generator: Generator, prompt: str) -> None:
        self.generator, self.prompt = generator, prompt
        self.frames: list[Image.Image] = []
        self.indices: list[int] = []
        """Candidates of the first micro-batch, which are shown."""

    def show(self, preview: Preview) -> None:
        """Add the first few pictures of a micro-batch, what is not drawn yet in grey; of the first micro-batch only."""
        self.indices = self.indices or preview.indices
        if preview.indices != self.indices:
            return
        grid, margin = self.generator.dalle.grid_size, margin_of(self.generator.dalle.vae)
        pictures = [
            partial_picture(self.generator.decode, row, preview.done, grid, margin)
            for row in preview.image_tokens[:SHOWN]
        ]
        self.frames.append(picture_grid([GridRow(self.prompt, pictures, [f"#{i}" for i in preview.indices[:SHOWN]])]))

    def end(self, images: Sequence[Float[Tensor, "c H W"]], labels: Sequence[str]) -> list[Image.Image]:
        """All frames, and as the last the best pictures."""
        return [*self.frames, picture_grid([GridRow(self.prompt, images[:SHOWN], labels[:SHOWN])])]


class Results:
    """The folder that generate.py writes, to be used with ``with``.

    The images of a prompt and ``ranking.json`` are written as the prompt is finished, ``grid.png`` at the end, which an
    error or a signal may bring; a folder without a finished prompt is removed.

    Raises:
        FileExistsError: it holds files already.
    """

    def __init__(self, config: GenerateConfig) -> None:
        is_new = config.out is None or not Path(config.out).exists()
        self.folder = make_folder(config.out, "runs/generate")
        self.config, self.settings, self.is_new = config, {**asdict(config), "out": str(self.folder)}, is_new
        self.ranking = self.folder / "ranking.json"
        self.rows: list[GridRow] = []
        self.report: list[dict[str, Any]] = []
        self.indexed = 0
        """Prompts in ``ranking.json``."""
        write_new(self.ranking, self._index())  # of two runs with one folder, one ends here

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        if self.report:
            self._write_index()
            save_png(picture_grid(self.rows[: len(self.report)]), self.folder / "grid.png", self.settings)
            return
        self.ranking.unlink()
        if self.is_new and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def add(self, stem: str, prompt: str, result: Ranked, film: PreviewAnimation) -> None:
        """Write a prompt's images, whose names begin with ``stem``, and note them in ``ranking.json``."""
        images = [result.candidates.images[at] for at in result.ranking.indices.tolist()]
        kept = describe(result, stem)
        labels = [label(row) for row in kept]
        for row, image in zip(kept, images, strict=True):
            save_png(to_pil(image), self.folder / row["file"], {**self.settings, "prompt": prompt, **row})
        if self.config.progressive:
            save_animation(film.end(images, labels), self.folder / f"{stem}.gif")
        self.rows.append(GridRow(prompt, images, labels))
        scores = result.ranking.all_scores
        all_scores = None if scores is None else [round(value, 4) for value in scores.tolist()]
        self.report.append(
            {"prompt": prompt, "kept": kept, "indices": result.candidates.indices, "all_scores": all_scores}
        )
        if len(self.report) - self.indexed > INDEX_EVERY * self.indexed:
            self._write_index()

    def summary(self) -> str:
        """What was drawn and where it is."""
        counts = [len(row["indices"]) for row in self.report]
        drawn = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        kept = max(len(row["kept"]) for row in self.report)
        return f"best {kept} of {drawn} a prompt: {self.folder / 'grid.png'}, {self.ranking}"

    def _index(self) -> bytes:
        return json.dumps({"settings": self.settings, "prompts": self.report}, indent=1).encode()

    def _write_index(self) -> None:
        """Write ``ranking.json`` anew, in one step."""
        if self.indexed < len(self.report):
            with atomic(self.ranking) as temporary:
                temporary.write_bytes(self._index())
            self.indexed = len(self.report)
