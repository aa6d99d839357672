"""Packs a folder of pictures with caption files into shards.

The layout is DALLE-pytorch's: ``cats/tom.jpg`` is captioned by ``cats/tom.txt``, one caption per line, at any depth.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dalle_pytorch.data.index import hash_share
from dalle_pytorch.data.packing import Item, PackConfig, PackReport, Skipped, captions_of, pack
from dalle_pytorch.data.walk import walk
from dalle_pytorch.files import split_lines
from dalle_pytorch.images import IMAGE_SUFFIXES

_NO_TEXT = "no captions: there is no .txt of the same stem in the same folder"


def pack_folder(
    path: str | Path,
    out: str | Path,
    *,
    image_size: int = 64,
    val_fraction: float = 0.05,
    samples_per_shard: int = 1000,
) -> PackReport:
    """Pack every captioned picture below a folder.

    A picture is captioned by the ``.txt`` of the same stem in the same folder; each line that is not blank is one
    caption. The short side is scaled to `image_size`, up or down, and the middle square is kept. A picture's split
    is fixed by the hash of its path, so it stays when others are added (but one picture is always in "val").
    Files left out are listed in ``skipped.json``.

    Args:
        path: the folder; its subfolders are searched too, and linked folders, each once.
        out: shard folder to write; absent or empty.
        image_size: side of the pictures in pixels.
        val_fraction: fraction of the pictures in "val", in [0, 1); above 0, at least one is.
        samples_per_shard: the most samples in one tar.

    Returns:
        The index and what was left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no picture was usable, or `val_fraction` is out of range; says what was found instead.
    """
    path, out = Path(path), Path(out)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: path must be a folder of pictures and .txt files")
    # Stray files are no samples, so no fraction left out is too large.
    config = PackConfig(
        image_size=image_size, samples_per_shard=samples_per_shard, val_fraction=val_fraction, max_bad_fraction=1.0
    )
    return pack(_mixed(path), out, config, name=path.resolve().name, where=str(path))


def _mixed(path: Path) -> Iterator[Item | Skipped]:
    """In the order of their hashes: mixed, and those for "val" first."""
    entries = list(_entries(path))
    yield from (entry for entry in entries if isinstance(entry, Skipped))
    items = [entry for entry in entries if isinstance(entry, Item)]
    yield from sorted(items, key=lambda item: (hash_share(item.path), item.path))


def _entries(path: Path) -> Iterator[Item | Skipped]:
    """Find the pictures with captions, and all other files."""
    unreadable: list[Skipped] = []
    for folder, names in walk(path, unreadable):
        texts: dict[str, str] = {}  # stem -> name of the caption file
        pictures: dict[str, list[str]] = defaultdict(list)
        for name in names:
            stem, ext = os.path.splitext(name)
            stem = unicodedata.normalize("NFC", stem)  # macOS writes "é" as two characters
            if ext.lower() in IMAGE_SUFFIXES:
                pictures[stem].append(name)
            elif ext.lower() == ".txt":
                texts[stem] = name
            else:
                yield Skipped(_relative(path, folder, name), "neither an image of a format that is read nor a .txt")
        for stem, text in texts.items():
            if stem not in pictures:
                reason = "captions without a picture of the same stem in the same folder"
                yield Skipped(_relative(path, folder, text), reason)
        for stem, found in pictures.items():
            captions, reason = _captions(folder / texts[stem]) if stem in texts else ([], _NO_TEXT)
            for name in found:
                relative = _relative(path, folder, name)
                if captions:
                    yield Item(relative, captions, (path / relative).read_bytes)
                else:
                    yield Skipped(relative, reason)
    yield from unreadable


def _captions(path: Path) -> tuple[list[str], str]:
    """Read a caption file; without captions, say why."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return [], f"captions not in UTF-8: save {path.name} as UTF-8"
    except OSError as error:
        return [], f"unreadable captions: {path.name}, {error.strerror}"
    return captions_of(split_lines(text)), f"empty captions: {path.name} has no line with text"


def _relative(path: Path, folder: Path, name: str) -> str:
    # A name that is no text at all (possible on Linux) is shown with escapes.
    text = (folder / name).relative_to(path).as_posix()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
