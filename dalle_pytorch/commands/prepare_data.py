"""Write image shards: ``prepare_data.py source=folder path=my_images out=data/mine``.

And token shards of them: ``prepare_data.py source=shards path=data/mine vae=vae.safetensors out=data/mine_tokens``.
"""

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dalle_pytorch.config import RENAMED, entry, register
from dalle_pytorch.data.coco import pack_coco
from dalle_pytorch.data.emoji import DEFAULT_STYLES, pack_emoji
from dalle_pytorch.data.encode import EncodeConfig, encode_folder
from dalle_pytorch.data.folder import pack_folder
from dalle_pytorch.data.huggingface import pack_huggingface
from dalle_pytorch.data.img2dataset import pack_img2dataset
from dalle_pytorch.data.npm import SETS, fetch_packages, packages_of
from dalle_pytorch.data.packing import PackConfig
from dalle_pytorch.data.rainbow import TRAIN_FRACTION, pack_rainbow
from dalle_pytorch.errors import UserError, at_least_one

log = logging.getLogger(__name__)

RENAMED |= {
    "encode": "say source=shards",
    "max_bad_share": "say max_bad_fraction=",
    "train_share": "say train_fraction=",
}


@dataclass(kw_only=True)
class PrepareDataConfig:
    """Settings of ``prepare_data.py`` with any source."""

    out: str = "???"
    """Shard folder to write; absent or empty."""

    def write(self) -> dict[str, Any]:
        """Write the shards; returns their index."""
        raise NotImplementedError


@dataclass(kw_only=True)
class _Images(PrepareDataConfig):
    """Settings of all sources of images that are to be scaled."""

    image_size: int = 64
    """Side of the images in pixels."""
    samples_per_shard: int = 1000
    """The most samples in one tar."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least_one(self, "image_size", "samples_per_shard")


@dataclass(kw_only=True)
class _Split(_Images):
    """Settings of sources that have no splits of their own."""

    val_fraction: float = 0.05
    """Fraction of the images in the split "val", in [0, 1); above 0, at least one is."""
    val_share: float | None = None
    """The old name of val_fraction."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.val_fraction = self.val_fraction if self.val_share is None else self.val_share
        self.packing()

    def packing(self) -> PackConfig:
        """How to pack."""
        return PackConfig(self.image_size, self.samples_per_shard, self.val_fraction)


@dataclass(kw_only=True)
class _Accounted(_Split):
    """Settings of sources where a file that cannot be used is an exception."""

    split: str | None = None
    """The split of all images; null for "train" and "val" by ``val_fraction``."""
    max_bad_fraction: float = 0.1
    """Samples that cannot be used are named and left out, up to this fraction (or 10 samples); more are an error."""

    def packing(self) -> PackConfig:
        """How to pack."""
        return PackConfig(self.image_size, self.samples_per_shard, self.val_fraction, self.split, self.max_bad_fraction)


@dataclass(kw_only=True)
class EmojiSource(_Images):
    """``source=emoji``: drawn from the npm packages of icon sets."""

    styles: list[str] = field(default_factory=lambda: list(DEFAULT_STYLES))
    """The sets to draw, of noto, fluent, fluent-flat, twemoji, openmoji, emojione, noto-v1 and fxemoji."""
    skin_tones: bool = False
    """Take the variants by skin tone too."""
    packages: str | None = None
    """Folder of unpacked npm packages, such as node_modules; null fetches them with npm."""
    cache: str = "~/.cache/dalle_pytorch/npm"
    """Where fetched packages are kept."""
    workers: int | None = None
    """Processes that draw; null for one per core."""

    def __post_init__(self) -> None:
        """Check the styles."""
        super().__post_init__()
        if unknown := [style for style in self.styles if style not in SETS]:
            raise UserError(f"unknown styles {unknown}; there are: {', '.join(SETS)}")

    def write(self) -> dict[str, Any]:
        """Fetch, draw and pack."""
        cache = Path(self.cache).expanduser()
        packages = Path(self.packages) if self.packages else fetch_packages(packages_of(self.styles), cache)
        return pack_emoji(
            packages, Path(self.out), styles=self.styles, skin_tones=self.skin_tones, image_size=self.image_size,
            samples_per_shard=self.samples_per_shard, workers=self.workers,
        )  # fmt: skip


@dataclass(kw_only=True)
class FolderSource(_Split):
    """``source=folder``: images with caption files beside them."""

    path: str = "???"
    """Folder of the images and their .txt files."""

    def write(self) -> dict[str, Any]:
        """Pack."""
        return pack_folder(
            self.path, self.out, image_size=self.image_size, val_fraction=self.val_fraction,
            samples_per_shard=self.samples_per_shard,
        ).index  # fmt: skip


@dataclass(kw_only=True)
class CocoSource(_Accounted):
    """``source=coco``: the captions of COCO."""

    path: str = "???"
    """The captions, such as captions_train2017.json."""
    images: str = "???"
    """Folder of the images."""

    def write(self) -> dict[str, Any]:
        """Pack."""
        return pack_coco(self.path, self.images, self.out, self.packing()).index


@dataclass(kw_only=True)
class Img2datasetSource(_Accounted):
    """``source=img2dataset``: what img2dataset downloaded."""

    path: str = "???"
    """Its output folder."""

    def write(self) -> dict[str, Any]:
        """Pack."""
        return pack_img2dataset(self.path, self.out, self.packing()).index


@dataclass(kw_only=True)
class HuggingfaceSource(_Accounted):
    """``source=huggingface``: a data set of the Hugging Face Hub."""

    path: str = "???"
    """Its name, or a local folder of one."""
    hf_split: str = "train"
    """The split of the data set to read."""
    image_column: str = "image"
    """The column of images."""
    caption_column: str = "caption"
    """The column of captions, each a text or a list of texts."""

    def write(self) -> dict[str, Any]:
        """Pack."""
        return pack_huggingface(
            self.path, self.out, self.packing(), hf_split=self.hf_split, image_column=self.image_column,
            caption_column=self.caption_column,
        ).index  # fmt: skip


@dataclass(kw_only=True)
class RainbowSource(PrepareDataConfig):
    """``source=rainbow``: drawn shapes of 32 x 32 pixels."""

    train_fraction: float = TRAIN_FRACTION
    """Fraction of the images in the split "train"; the rest is "test"."""
    samples_per_shard: int = 1000
    """The most samples in one tar."""

    def write(self) -> dict[str, Any]:
        """Draw and pack."""
        return pack_rainbow(
            Path(self.out), train_fraction=self.train_fraction, samples_per_shard=self.samples_per_shard
        )


@dataclass(kw_only=True)
class ShardsSource(EncodeConfig, PrepareDataConfig):
    """``source=shards``: image shards to token shards; begun again after an interruption it goes on."""

    workers: int | None = None
    """Processes that encode; null for one per core, or per GPU."""
    device: str = "cpu"
    """Where they encode: "cpu" or "cuda"."""

    def write(self) -> dict[str, Any]:
        """Encode."""
        settings = EncodeConfig(**{item.name: getattr(self, item.name) for item in fields(EncodeConfig)})
        return encode_folder(settings, self.out, workers=self.workers, device=self.device)


for _source in (
    EmojiSource, FolderSource, CocoSource, Img2datasetSource, HuggingfaceSource, RainbowSource, ShardsSource
):  # fmt: skip
    register(_source.__name__.removesuffix("Source").lower(), _source, group="source")


@entry("prepare_data", PrepareDataConfig)
def main(config: PrepareDataConfig) -> None:
    """Write the shards of a source; says what was written and what was left out."""
    for split, count in config.write()["splits"].items():
        log.info("%s: %d images", split, count)
    log.info("written to %s", config.out)


if __name__ == "__main__":
    main()
