"""Packs COCO captions: ``captions_train2017.json`` and the folder of its pictures."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dalle_pytorch.data.packing import Item, PackConfig, PackReport, Skipped, captions_of, escaped, pack
from dalle_pytorch.errors import UserError


class _Annotations(NamedTuple):
    """What the JSON says: (id, file name) of the pictures, and the captions of each id."""

    pictures: list[tuple[Any, str]]
    captions: dict[Any, list[str]]


def pack_coco(path: str | Path, images: str | Path, out: str | Path, config: PackConfig) -> PackReport:
    """Pack the pictures of a COCO captions file, each with all its captions.

    Args:
        path: the JSON: "images" with id and file_name, "annotations" with image_id and caption. It is held in memory,
            the pictures are not.
        images: the folder that the file names are relative to.
        out: shard folder to write; absent or empty.
        config: size, splits and limits.

    Returns:
        The index and what was left out: pictures that are missing, unreadable or without captions.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: it is no COCO captions file, or too little of it is usable.
    """
    path, images = Path(path), Path(images)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: path must be a COCO captions file, such as captions_train2017.json")
    if not images.is_dir():
        raise FileNotFoundError(f"no folder {images}: images must be the folder of the pictures of {path.name}")
    entries = _entries(_read(path), images)
    return pack(entries, Path(out), config, name=path.stem, where=str(path), source={"format": "coco"})


def _read(path: Path) -> _Annotations:
    try:
        content = json.loads(path.read_bytes())
        pictures = [(image["id"], escaped(image["file_name"])) for image in content["images"]]
        captions = defaultdict(list)
        for annotation in content["annotations"]:
            captions[annotation["image_id"]] += captions_of(annotation["caption"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a COCO captions file, which has images with id and file_name, and annotations with "
            f"image_id and caption: {error!r}"
        ) from error
    return _Annotations(pictures, captions)


def _entries(annotations: _Annotations, images: Path) -> Iterator[Item | Skipped]:
    seen: set[str] = set()
    for number, file in annotations.pictures:
        captions = annotations.captions.get(number)
        if file in seen:
            yield Skipped(file, "repeated picture: the JSON lists it more than once; the first counts")
        elif not captions:
            yield Skipped(file, "no captions: no annotation with text has its id")
        elif not (images / file).is_file():
            yield Skipped(file, f"missing picture: there is no such file below {images}")
        else:
            yield Item(file, captions, (images / file).read_bytes)
        seen.add(file)
    for number in annotations.captions.keys() - {number for number, _ in annotations.pictures}:
        yield Skipped(f"image_id {number}", "captions without a picture: no picture of the JSON has this id")
