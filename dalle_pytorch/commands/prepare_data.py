"""Write image shards: ``prepare_data.py source=folder path=my_pictures out=data/mine``.

And token shards of them: ``prepare_data.py encode=true path=data/mine vae=vae.safetensors out=data/mine_tokens``.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from dalle_pytorch.config import entry
from dalle_pytorch.data.coco import pack_coco
from dalle_pytorch.data.emoji import DEFAULT_STYLES, pack_emoji
from dalle_pytorch.data.encode import EncodeConfig, encode_folder
from dalle_pytorch.data.folder import pack_folder
from dalle_pytorch.data.huggingface import pack_huggingface
from dalle_pytorch.data.img2dataset import pack_img2dataset
from dalle_pytorch.data.npm import SETS, fetch_packages, packages_of
from dalle_pytorch.data.packing import PackConfig
from dalle_pytorch.data.rainbow import IMAGE_SIZE, TRAIN_SHARE, pack_rainbow
from dalle_pytorch.errors import UserError

log = logging.getLogger(__name__)

_IMAGE_SIZE = 64  # unless set; of all but the rainbow


@dataclass
class PrepareDataConfig:
    """Settings of ``prepare_data.py``.

    Attributes:
        source: "emoji", "folder", "coco", "img2dataset", "huggingface" or "rainbow"; or "shards", to encode them.
        encode: the same as source=shards: turn the pictures of image shards into tokens; begun again after an
            interruption it goes on.
        vae: shards: checkpoint of the image tokenizer.
        out: shard folder to write; absent or empty.
        path: folder: where the pictures and their .txt files are; coco: the captions JSON; img2dataset: its output
            folder; huggingface: a data set's name, or a local folder of one; shards: folder of image shards.
        images: coco: folder of the pictures.
        image_size: side of the pictures in pixels; null for 64 (rainbow: always 32).
        samples_per_shard: the most samples in one tar.
        val_share: folder, coco, img2dataset, huggingface: share of the pictures in the split "val".
        split: coco, img2dataset, huggingface: the split of all pictures; null for "train" and "val" by `val_share`.
        max_bad_share: coco, img2dataset, huggingface: share of unusable samples (above 10 of them) that is an error.
        hf_split: huggingface: the split of the data set to read.
        image_column: huggingface: the column of pictures.
        caption_column: huggingface: the column of captions, each a text or a list of texts.
        train_share: rainbow: share of the pictures in the split "train"; the rest is "test".
        styles: emoji: the sets to draw, of noto, fluent, fluent-flat, twemoji, openmoji and emojione.
        skin_tones: emoji: take the variants by skin tone too.
        packages: emoji: folder of unpacked npm packages, such as node_modules; null fetches them with npm.
        cache: emoji: where fetched packages are kept.
        workers: emoji, shards: processes that draw or encode; null for one per core, or per GPU.
        device: shards: "cpu" or "cuda".
        crops: shards: variants of each training picture, every one augmented in its own way.
        train_splits: shards: splits whose pictures are augmented; of the others each is taken once, as it is.
        resize: shards: scale pictures of another size than the tokenizer's.
        jitter: shards: shift by up to so many pixels each way.
        crop: shards: cut at random, as in the paper (A.2, listing 1); needs resize.
        flip: shards: mirror half of the time.
        seed: shards: of the augmentation.
    """

    source: str = "emoji"
    encode: bool = False
    vae: str | None = None
    out: str | None = None
    path: str | None = None
    images: str | None = None
    image_size: int | None = None
    samples_per_shard: int = 1000
    val_share: float = 0.05
    split: str | None = None
    max_bad_share: float = 0.1
    hf_split: str = "train"
    image_column: str = "image"
    caption_column: str = "caption"
    train_share: float = TRAIN_SHARE
    styles: list[str] = field(default_factory=lambda: list(DEFAULT_STYLES))
    skin_tones: bool = False
    packages: str | None = None
    cache: str = "~/.cache/dalle_pytorch/npm"
    workers: int | None = None
    device: str = "cpu"
    crops: int = 1
    train_splits: list[str] = field(default_factory=lambda: ["train"])
    resize: bool = False
    jitter: int = 0
    crop: bool = False
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what belongs together."""
        if self.encode:
            self.source = "shards"
        if self.source not in SOURCES:
            raise UserError(f"source={self.source} is not one of: {', '.join(SOURCES)}")
        if not self.out:
            raise UserError("out=FOLDER is missing: where to write the shards")
        self._check_source(SOURCES[self.source])
        if self.source == "rainbow" and self.image_size not in (None, IMAGE_SIZE):
            raise UserError(f"the rainbow pictures have image_size={IMAGE_SIZE}; leave it out")
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")
        if unknown := [style for style in self.styles if style not in SETS]:
            raise UserError(f"unknown styles {unknown}; there are: {', '.join(SETS)}")

    def _check_source(self, source: "Source") -> None:
        """Ask for what the source needs, refuse what only others take."""
        for name, example in source.needs.items():
            if not getattr(self, name):
                raise UserError(f"source={self.source} needs {name}={example}")
        for item in fields(self):
            takers = [name for name, other in SOURCES.items() if item.name in (*other.needs, *other.takes)]
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if takers and self.source not in takers and getattr(self, item.name) != default:
                raise UserError(f"{item.name} goes with source={' or '.join(takers)}, not with source={self.source}")


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


def _coco(config: PrepareDataConfig, out: Path) -> dict[str, Any]:
    path, images = Path(config.path or "").expanduser(), Path(config.images or "").expanduser()
    return pack_coco(path, images, out, _packing(config)).index


def _img2dataset(config: PrepareDataConfig, out: Path) -> dict[str, Any]:
    return pack_img2dataset(Path(config.path or "").expanduser(), out, _packing(config)).index


def _huggingface(config: PrepareDataConfig, out: Path) -> dict[str, Any]:
    report = pack_huggingface(
        config.path or "",
        out,
        _packing(config),
        hf_split=config.hf_split,
        image_column=config.image_column,
        caption_column=config.caption_column,
    )
    return report.index


def _packing(config: PrepareDataConfig) -> PackConfig:
    return PackConfig(
        image_size=config.image_size or _IMAGE_SIZE,
        samples_per_shard=config.samples_per_shard,
        val_share=config.val_share,
        split=config.split,
        max_bad_share=config.max_bad_share,
    )


def _encode(config: PrepareDataConfig, out: Path) -> dict[str, Any]:
    names = [item.name for item in fields(EncodeConfig)]
    settings = EncodeConfig(**{name: getattr(config, name) for name in names})
    return encode_folder(settings, out, workers=config.workers, device=config.device)


class Source(NamedTuple):
    """Where pictures come from.

    Attributes:
        pack: writes the shards, returns their index.
        needs: settings that it cannot do without, each with an example.
        takes: other settings of its own. What no source names goes with all.
    """

    pack: Callable[[PrepareDataConfig, Path], dict[str, Any]]
    needs: Mapping[str, str]
    takes: tuple[str, ...]


_SPLITTING = ("val_share", "split", "max_bad_share")
SOURCES = {
    "emoji": Source(_emoji, {}, ("styles", "skin_tones", "packages", "cache", "workers")),
    "folder": Source(_folder, {"path": "FOLDER"}, ("val_share",)),
    "coco": Source(_coco, {"path": "captions_train2017.json", "images": "FOLDER"}, _SPLITTING),
    "img2dataset": Source(_img2dataset, {"path": "FOLDER"}, _SPLITTING),
    "huggingface": Source(
        _huggingface, {"path": "NAME_OR_FOLDER"}, (*_SPLITTING, "hf_split", "image_column", "caption_column")
    ),
    "rainbow": Source(_rainbow, {}, ("train_share",)),
    "shards": Source(
        _encode,
        {"path": "FOLDER_OF_IMAGE_SHARDS", "vae": "vae.safetensors"},
        ("workers", "device", "crops", "train_splits", "resize", "jitter", "crop", "flip", "seed", "max_bad_share"),
    ),
}


@entry("prepare_data", PrepareDataConfig)
def main(config: PrepareDataConfig) -> None:
    """Pack the source; says what was written and what was left out."""
    out = Path(config.out or "").expanduser()
    index = SOURCES[config.source].pack(config, out)
    for split, count in index["splits"].items():
        log.info("%s: %d pictures", split, count)
    log.info("written to %s", out)


if __name__ == "__main__":
    main()
