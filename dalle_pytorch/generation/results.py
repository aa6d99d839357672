"""What generate.py writes: pictures, their grid, an animation of how they appeared, and ``ranking.json``.

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

from dalle_pytorch.files import ensure_empty
from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.generation.generator import Generator, Preview, Ranked
from dalle_pytorch.generation.grid import GridRow, partial_picture, picture_grid, save_animation, save_png
from dalle_pytorch.images import to_pil
from dalle_pytorch.models.image_tokenizer import margin_of

SHOWN = 8
"""Pictures in the animated preview."""


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
    """The folder that generate.py writes.

    Raises:
        FileExistsError: it holds files already.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.config, self.settings = config, asdict(config)
        self.folder = Path(config.out)
        ensure_empty(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[GridRow] = []
        self.report: list[dict[str, Any]] = []

    def add(self, stem: str, prompt: str, result: Ranked, film: PreviewAnimation) -> None:
        """Write a prompt's pictures, whose names begin with ``stem``."""
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

    def finish(self) -> str:
        """Write the grid and ``ranking.json``; without a finished prompt remove the folder.

        Returns:
            What was drawn and where it is; "" if nothing.
        """
        if not self.rows:
            self.folder.rmdir()
            return ""
        grid, ranking = self.folder / "grid.png", self.folder / "ranking.json"
        save_png(picture_grid(self.rows), grid, self.settings)
        ranking.write_text(json.dumps({"settings": self.settings, "prompts": self.report}, indent=1), encoding="utf-8")
        counts = [len(row["indices"]) for row in self.report]
        drawn = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
        kept = max(len(row["kept"]) for row in self.report)
        return f"best {kept} of {drawn} a prompt: {grid}, {ranking}"
