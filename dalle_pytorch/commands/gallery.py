"""Images for a model card, none of them picked by eye: ``dalle-gallery weights=… clip=… out=…``."""

import logging
from dataclasses import asdict
from pathlib import Path

from dalle_pytorch.checkpoints.loading import load, load_scorer
from dalle_pytorch.config import entry
from dalle_pytorch.evaluation.gallery import CELL, Artist, GalleryConfig
from dalle_pytorch.files import ensure_empty
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.grid import picture_grid, save_png

log = logging.getLogger(__name__)


@entry("gallery", GalleryConfig)
def main(config: GalleryConfig) -> None:
    """Draw and write every figure."""
    folder = Path(config.out)
    ensure_empty(folder)
    generator = Generator(load(config.weights, kind="dalle"), load_scorer(config.clip))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in Artist(generator, config).figures():
        save_png(picture_grid(rows, cell=CELL), folder / f"{name}.png", asdict(config))
        log.info("%s", folder / f"{name}.png")


if __name__ == "__main__":
    main()
