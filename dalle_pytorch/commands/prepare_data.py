"""Write image shards: ``prepare_data.py source=folder path=my_pictures out=data/mine``."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle_pytorch.config import entry
from dalle_pytorch.data.emoji import DEFAULT_STYLES, pack_emoji
from dalle_pytorch.data.folder import pack_folder
from dalle_pytorch.data.npm import SETS, fetch_packages, packages_of
from dalle_pytorch.data.rainbow import IMAGE_SIZE, TRAIN_SHARE, pack_rainbow

log = logging.getLogger(__name__)

_IMAGE_SIZE = 64  # of emoji and folders, unless set


@dataclass
class PrepareDataConfig:
    """Settings of ``prepare_data.py``.

    Attributes:
        source: "emoji", "folder" or "rainbow".
        out: shard folder to write; absent or empty.
        path: folder: where the pictures and their .txt files are.
        image_size: side of the pictures in pixels; null for 64 (rainbow: always 32).
        samples_per_shard: the most samples in one tar.
        val_share: folder: share of the pictures in the split "val".
        train_share: rainbow: share of the pictures in the split "train"; the rest is "test".
        styles: emoji: the sets to draw, of noto, fluent, fluent-flat, twemoji, openmoji and emojione.
        skin_tones: emoji: take the variants by skin tone too.
        packages: emoji: folder of unpacked npm packages, such as node_modules; null fetches them with npm.
        cache: emoji: where fetched packages are kept.
        workers: emoji: processes that draw; null for one per core.
    """

    source: str = "emoji"
    out: str | None = None
    path: str | None = None
    image_size: int | None = None
    samples_per_shard: int = 1000
    val_share: float = 0.05
    train_share: float = TRAIN_SHARE
    styles: list[str] = field(default_factory=lambda: list(DEFAULT_STYLES))
    skin_tones: bool = False
    packages: str | None = None
    cache: str = "~/.cache/dalle_pytorch/npm"
    workers: int | None = None

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source} is not one of: {', '.join(SOURCES)}")
        if not self.out:
            raise ValueError("out=FOLDER is missing: where to write the shards")
        if (self.source == "folder") != (self.path is not None):
            raise ValueError("path=FOLDER goes with source=folder, and is needed there")
        if self.source == "rainbow" and self.image_size not in (None, IMAGE_SIZE):
            raise ValueError(f"the rainbow pictures have image_size={IMAGE_SIZE}; leave it out")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {self.image_size}")
        if unknown := [style for style in self.styles if style not in SETS]:
            raise ValueError(f"unknown styles {unknown}; there are: {', '.join(SETS)}")


def _emoji(config: PrepareDataConfig, out: Path) -> dict[str, Any]:
    if config.packages is not None:
        packages = Path(config.packages).expanduser()
    else:
        packages = fetch_packages(packages_of(config.styles), Path(config.cache).expanduser())
    return pack_emoji(
        packages,
        out,
        styles=config.styles,
        skin_tones=config.skin_tones,
        image_size=config.image_size or _IMAGE_SIZE,
        samples_per_shard=config.samples_per_shard,
        workers=config.workers,
    )


def _folder(config: PrepareDataConfig, out: Path) -> dict[str, Any]:
    report = pack_folder(
        Path(config.path or "").expanduser(),
        out,
        image_size=config.image_size or _IMAGE_SIZE,
        val_share=config.val_share,
        samples_per_shard=config.samples_per_shard,
    )
    return report.index


def _rainbow(config: PrepareDataConfig, out: Path) -> dict[str, Any]:
    return pack_rainbow(out, train_share=config.train_share, samples_per_shard=config.samples_per_shard)


SOURCES: dict[str, Callable[[PrepareDataConfig, Path], dict[str, Any]]] = {
    "emoji": _emoji,
    "folder": _folder,
    "rainbow": _rainbow,
}


@entry("prepare_data", PrepareDataConfig)
def main(config: PrepareDataConfig) -> None:
    """Pack the source; says what was written and what was left out."""
    out = Path(config.out or "").expanduser()
    index = SOURCES[config.source](config, out)
    for split, count in index["splits"].items():
        log.info("%s: %d pictures", split, count)
    log.info("written to %s", out)


if __name__ == "__main__":
    main()
