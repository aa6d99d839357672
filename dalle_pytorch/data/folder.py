"""Packs a folder of pictures with caption files into shards.

The layout is DALLE-pytorch's: ``cats/tom.jpg`` is captioned by ``cats/tom.txt``, one caption per line, at any depth.
"""

import hashlib
import io
import logging
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dalle_pytorch.data.emoji_names import slug
from dalle_pytorch.data.images import fit, open_rgb
from dalle_pytorch.data.index import hash_share, write_json
from dalle_pytorch.data.shards import ShardWriter

log = logging.getLogger(__name__)

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
SKIPPED_NAME = "skipped.json"
_QUALITY = 95  # of the WebP; at 90 and below the loss begins to show in flat colours
_SLUG_LENGTH = 60
_NO_TEXT = "no captions: there is no .txt of the same stem in the same folder"


class Skipped(NamedTuple):
    """A file that was left out: its path below the folder, and why."""

    path: str
    reason: str


class FolderReport(NamedTuple):
    """What packing a folder did: the index written, and every file left out."""

    index: dict[str, Any]
    skipped: list[Skipped]

    def summary(self) -> str:
        """Tell in a few lines what was packed and what was left out."""
        splits = ", ".join(f"{count} {split}" for split, count in self.index["splits"].items())
        reasons = Counter(item.reason.split(":")[0] for item in self.skipped)
        lines = [
            f"packed {splits}; left out {len(self.skipped)} files{' (all in ' + SKIPPED_NAME + ')' if reasons else ''}"
        ]
        lines += [f"  {count} x {reason}" for reason, count in reasons.most_common()]
        return "\n".join(lines)


class _Pair(NamedTuple):
    """A picture and its captions, by the picture's path below the folder."""

    path: str
    captions: list[str]


def pack_folder(
    path: str | Path,
    out: str | Path,
    *,
    image_size: int = 64,
    val_share: float = 0.05,
    samples_per_shard: int = 1000,
) -> FolderReport:
    """Pack every captioned picture below a folder.

    A picture is captioned by the ``.txt`` of the same stem in the same folder; each line that is not blank is one
    caption. The short side is scaled to `image_size`, up or down, and the middle square is kept. A picture's split
    is fixed by the hash of its path, so it stays when others are added (but one picture is always in "val").
    Files left out are listed in ``skipped.json``.

    Args:
        path: the folder; its subfolders are searched too, links to folders are not followed.
        out: shard folder to write; absent or empty.
        image_size: side of the pictures in pixels.
        val_share: share of the pictures in "val", in [0, 1); above 0, at least one is.
        samples_per_shard: the most samples in one tar.

    Returns:
        The index and what was left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no picture was usable, or `val_share` is out of range; says what was found instead.
    """
    path, out = Path(path), Path(out)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: path must be a folder of pictures and .txt files")
    if not 0 <= val_share < 1:
        raise ValueError(f"val_share must be at least 0 and below 1, got {val_share}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    writer = ShardWriter(
        out,
        name=path.resolve().name,
        image_size=image_size,
        samples_per_shard=samples_per_shard,
        source={"val_share": val_share},
    )
    skipped: list[Skipped] = []
    with writer:
        # In the order of their hashes: mixed, and those for "val" first.
        pairs = sorted(_pairs(path, skipped), key=lambda pair: (hash_share(pair.path), pair.path))
        counts = Counter[str]()
        for pair in pairs:
            try:
                image = _encode((path / pair.path).read_bytes(), image_size, pair.path)
            except (ValueError, OSError) as error:
                skipped.append(Skipped(pair.path, f"unreadable picture: {error}"))
                continue
            first = val_share > 0 and not counts
            split = "val" if first or hash_share(pair.path) < val_share else "train"
            meta = {"captions": pair.captions, "path": pair.path}
            writer.write(split, _key(pair.path), image, "webp", meta)
            counts[split] += 1
        skipped.sort()
        if not counts["train"]:
            raise ValueError(_nothing_to_train_on(path, sum(counts.values()), skipped))
    write_json(out / SKIPPED_NAME, [item._asdict() for item in skipped])
    report = FolderReport(writer.index(), skipped)
    log.info("%s", report.summary())
    return report


def _pairs(path: Path, skipped: list[Skipped]) -> Iterator[_Pair]:
    """Find the pictures with captions; note the other files in `skipped`."""
    for folder, names in _folders(path):
        texts: dict[str, str] = {}  # stem -> name of the caption file
        pictures: dict[str, list[str]] = defaultdict(list)
        for name in names:
            stem, ext = os.path.splitext(name)
            stem = unicodedata.normalize("NFC", stem)  # macOS writes "é" as two characters
            if ext.lower() in PICTURES:
                pictures[stem].append(name)
            elif ext.lower() == ".txt":
                texts[stem] = name
            else:
                reason = f"neither a picture ({' '.join(PICTURES)}) nor a .txt"
                skipped.append(Skipped(_relative(path, folder, name), reason))
        for stem, text in texts.items():
            if stem not in pictures:
                reason = "captions without a picture of the same stem in the same folder"
                skipped.append(Skipped(_relative(path, folder, text), reason))
        for stem, found in pictures.items():
            captions, reason = _captions(folder / texts[stem]) if stem in texts else ([], _NO_TEXT)
            for name in found:
                relative = _relative(path, folder, name)
                if captions:
                    yield _Pair(relative, captions)
                else:
                    skipped.append(Skipped(relative, reason))


def _folders(path: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, subfolders, names in os.walk(path):
        subfolders.sort()
        yield Path(folder), sorted(names)


def _captions(path: Path) -> tuple[list[str], str]:
    """Read a caption file; without captions, say why."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return [], f"captions not in UTF-8: save {path.name} as UTF-8"
    except OSError as error:
        return [], f"unreadable captions: {path.name}, {error.strerror}"
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line], f"empty captions: {path.name} has no line with text"


def _encode(data: bytes, image_size: int, name: str) -> bytes:
    out = io.BytesIO()
    fit(open_rgb(data, name=name), image_size).save(out, "webp", quality=_QUALITY, method=4)
    return out.getvalue()


def _key(path: str) -> str:
    """A key that shows the path, and is unique whatever characters or folders it has."""
    readable = slug(path)[:_SLUG_LENGTH].strip("-")
    digest = hashlib.sha256(path.encode()).hexdigest()[:12]
    return f"{readable}_{digest}" if readable else digest


def _relative(path: Path, folder: Path, name: str) -> str:
    # A name that is no text at all (possible on Linux) is shown with escapes.
    text = (folder / name).relative_to(path).as_posix()
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _nothing_to_train_on(path: Path, usable: int, skipped: list[Skipped]) -> str:
    shown = "".join(f"\n  {item.path}: {item.reason}" for item in skipped[:5])
    return (
        f"{path} has {usable} usable pictures, and needs one to train on and one for val (val_share=0 for none); "
        f"left out {len(skipped)} files{', among them' if shown else ''}{shown}"
    )
