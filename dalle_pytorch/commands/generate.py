"""Prompts to ranked pictures: ``generate.py prompt="a red apple" dalle=... clip=... num_candidates=64 num_keep=8``."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dalle_pytorch.checkpoint import load
from dalle_pytorch.config import entry
from dalle_pytorch.data.images import to_pil
from dalle_pytorch.generation.generator import Candidates, Generator, SamplingConfig
from dalle_pytorch.generation.grid import GridRow, picture_grid, save_png
from dalle_pytorch.generation.rerank import Ranking


@dataclass(kw_only=True)
class GenerateConfig:
    """What to draw, with which models, and where to put it."""

    prompt: str | None = None
    """One prompt, or several with | between them."""
    prompts_file: str | None = None
    """Text file with a prompt a line, in place of ``prompt``."""
    dalle: str = "???"
    """Checkpoint of a DALLE; it carries its image and text tokenizers."""
    clip: str | None = None
    """Checkpoint of the CLIP that ranks; null = the candidates keep their order."""
    num_candidates: int = 64
    """Pictures drawn for each prompt (the paper: 512)."""
    num_keep: int = 8
    """Pictures kept for each prompt."""
    seed: int = 0
    """The same seed gives the same pictures."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Temperature, truncation and guidance."""
    batch_size: int = 64
    """Candidates sampled together: memory and speed, not the result."""
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
        if not 1 <= self.num_keep <= self.num_candidates:
            raise ValueError(f"num_keep ({self.num_keep}) must lie in 1 to num_candidates ({self.num_candidates})")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def prompts(self) -> list[str]:
        """The prompts, from the setting or the file.

        Raises:
            ValueError: none given, or both ways at once.
            FileNotFoundError: no such file.
        """
        if (self.prompt is None) == (self.prompts_file is None):
            raise ValueError('give the prompts one way: prompt="a red apple|a blue car" or prompts_file=FILE')
        if self.prompt is not None:
            lines = self.prompt.split("|")
        else:
            path = Path(str(self.prompts_file))
            if not path.is_file():
                raise FileNotFoundError(f"prompts_file={path} does not exist")
            lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise ValueError("there is no prompt in what was given: every line is empty")
        return prompts


def file_stem(number: int, prompt: str) -> str:
    """A file name that begins with the prompt's number and hints at its words."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return f"{number:02d}_{words[:40].strip('-')}".rstrip("_")


def new_folder(path: str) -> Path:
    """Make a folder for results.

    Raises:
        FileExistsError: it holds files already.
    """
    folder = Path(path)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"out={folder} holds files already; choose another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe(ranking: Ranking, candidates: Candidates, stem: str) -> list[dict[str, Any]]:
    """A row of ``ranking.json`` for each kept candidate: rank, index, score, file name and image tokens."""
    scores = [None] * len(ranking.indices) if ranking.scores is None else ranking.scores.tolist()
    return [
        {
            "rank": rank,
            "index": index,
            "score": score if score is None else round(score, 4),
            "file": f"{stem}_{rank:02d}.png",
            "image_tokens": candidates.image_tokens[index].tolist(),
        }
        for rank, (index, score) in enumerate(zip(ranking.indices.tolist(), scores, strict=True))
    ]


def label(row: dict[str, Any]) -> str:
    """What stands under a picture of the grid: its index and its score."""
    return f"#{row['index']}" if row["score"] is None else f"#{row['index']}  {row['score']:.3f}"


def draw(generator: Generator, prompt: str, config: GenerateConfig) -> tuple[Candidates, Ranking]:
    """Sample and rank one prompt under a progress bar."""
    with tqdm(total=config.num_candidates, desc=prompt[:40], unit="picture") as bar:
        return generator.generate(
            prompt,
            num_candidates=config.num_candidates,
            num_keep=config.num_keep,
            seed=config.seed,
            sampling=config.sampling,
            truncate=config.truncate,
            progress=bar.update,
        )


@entry("generate", GenerateConfig)
def main(config: GenerateConfig) -> None:
    """Sample, rank, and write single PNGs, ``grid.png`` and ``ranking.json``."""
    prompts = config.prompts()
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dalle = load(config.dalle, kind="dalle").to(device)
    clip = load(config.clip, kind="clip").to(device) if config.clip is not None else None
    generator = Generator(dalle, clip, batch_size=config.batch_size)
    generator.check(prompts, truncate=config.truncate)
    folder, settings = new_folder(config.out), asdict(config)
    rows, report = [], []
    for number, prompt in enumerate(prompts):
        candidates, ranking = draw(generator, prompt, config)
        kept = describe(ranking, candidates, file_stem(number, prompt))
        for row in kept:
            save_png(
                to_pil(candidates.images[row["index"]]), folder / row["file"], {**settings, "prompt": prompt, **row}
            )
        rows.append(GridRow(prompt, [candidates.images[row["index"]] for row in kept], [label(row) for row in kept]))
        scores = None if ranking.all_scores is None else [round(score, 4) for score in ranking.all_scores.tolist()]
        report.append({"prompt": prompt, "kept": kept, "all_scores": scores})
    save_png(picture_grid(rows), folder / "grid.png", settings)
    ranking_file = folder / "ranking.json"
    ranking_file.write_text(json.dumps({"settings": settings, "prompts": report}, indent=1), encoding="utf-8")
    print(f"best {config.num_keep} of {config.num_candidates} a prompt: {folder / 'grid.png'}, {ranking_file}")


if __name__ == "__main__":
    main()
