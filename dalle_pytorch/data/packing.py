"""Packs captioned pictures of any source into shards: scales, encodes, splits, and accounts for what is left out.

A source is an iterator of `Item` (a captioned picture) and `Skipped` (what it cannot use); one picture at a time is
in memory.
"""

import html
import io
import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from dalle_pytorch.data.bad_samples import BadSamples
from dalle_pytorch.data.emoji_names import slug
from dalle_pytorch.data.index import SKIPPED_NAME, hash_share
from dalle_pytorch.data.shards import ShardWriter
from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.files import write_json
from dalle_pytorch.images import fit, open_rgb

log = logging.getLogger(__name__)

_QUALITY = 95  # of the WebP; at 90 and below the loss begins to show in flat colours
_SLUG_LENGTH = 60
_ALWAYS_ALLOWED = 10  # bad samples: a few say nothing about a small data set
_SHOWN = 5  # left out, in an error


class Skipped(NamedTuple):
    """What was left out: its path or name in the source, and why ("kind of reason: details")."""

    path: str
    reason: str


class Item(NamedTuple):
    """A captioned picture of a source.

    Attributes:
        path: what names it in the source, unique there; its key and split follow from it.
        captions: at least one, none blank.
        picture: the encoded picture, or a function that reads it (its UserError or OSError leaves the picture out).
    """

    path: str
    captions: list[str]
    picture: bytes | Callable[[], bytes]


@dataclass(frozen=True)
class PackConfig:
    """How pictures are packed, whatever their source.

    Attributes:
        image_size: side of the pictures in pixels.
        samples_per_shard: the most samples in one tar.
        val_fraction: fraction of the pictures in "val", in [0, 1); above 0, at least one is. Unused with `split`.
        split: the split of all pictures; None for "train" and "val" by the hash of the path.
        max_bad_fraction: the largest fraction of unusable samples, in [0, 1], that is no error; up to 10 never are.
    """

    image_size: int = 64
    samples_per_shard: int = 1000
    val_fraction: float = 0.05
    split: str | None = None
    max_bad_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        at_least_one(self, "image_size")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction must lie between 0 and 1, got {self.max_bad_fraction}")

    def split_rule(self) -> dict[str, Any]:
        """How the splits came about, for the index."""
        return {"val_share": self.val_fraction} if self.split is None else {"split": self.split}


class PackReport(NamedTuple):
    """What packing did: the index written, and everything left out."""

    index: dict[str, Any]
    skipped: list[Skipped]

    def summary(self) -> str:
        """Tell in a few lines what was packed and what was left out."""
        splits = ", ".join(f"{count} {split}" for split, count in self.index["splits"].items())
        reasons = Counter(_kind(item) for item in self.skipped)
        lines = [f"packed {splits}; left out {len(self.skipped)}{f' (all in {SKIPPED_NAME})' if reasons else ''}"]
        lines += [f"  {count} x {reason}" for reason, count in reasons.most_common()]
        return "\n".join(lines)


class _Sample(NamedTuple):
    """An item whose picture is scaled and encoded."""

    path: str
    captions: list[str]
    image: bytes


def pack(
    entries: Iterable[Item | Skipped],
    out: Path,
    config: PackConfig,
    *,
    name: str,
    where: str,
    source: dict[str, Any] | None = None,
) -> PackReport:
    """Write the items of a source as shards, in their order, and what was left out as ``skipped.json``.

    Args:
        entries: the items, and what the source itself leaves out.
        out: shard folder to write; absent or empty.
        config: how.
        name: name of the data set, for the index.
        where: what to call the source in an error: its path.
        source: description of the source, for the index.

    Returns:
        The index and what was left out.

    Raises:
        ValueError: too many samples are unusable, or none is left to train on; says why. Nothing is written then.
    """
    writer = ShardWriter(
        out,
        name=name,
        image_size=config.image_size,
        samples_per_shard=config.samples_per_shard,
        source={**(source or {}), **config.split_rule()},
    )
    skipped: list[Skipped] = []
    counts = Counter[str]()
    with writer:
        for split, sample in _assign(_encoded(entries, config.image_size, skipped), config):
            meta = {"captions": sample.captions, "path": sample.path}
            writer.write(split, _key(sample.path), sample.image, "webp", meta)
            counts[split] += 1
        skipped.sort()
        bad = BadSamples(where, config.max_bad_fraction, "max_bad_fraction", allowed=_ALWAYS_ALLOWED)
        for item in skipped:
            bad.add(_kind(item), f"{item.path}: {item.reason}")
        bad.check(counts.total() + len(skipped))
        if not counts[config.split or "train"]:
            raise UserError(_nothing_to_train_on(where, counts.total(), skipped, config))
        write_json(out / SKIPPED_NAME, [item._asdict() for item in skipped])
    report = PackReport(writer.index(), skipped)
    log.info("%s", report.summary())
    return report


def captions_of(value: object) -> list[str]:
    """The captions of a text or a list of texts: white space is collapsed, what shows nothing or is no text dropped."""
    values = value if isinstance(value, list) else [value]
    texts = [" ".join(escaped(text).split()) for text in values if isinstance(text, str)]
    return [text for text in texts if _is_visible(text)]


def _is_visible(text: str) -> bool:
    """Whether anything of a caption would be printed, be it written as HTML ("&nbsp;")."""
    # Zero-width and other format characters are Cf; a lone accent or variation selector (Mn) belongs to nothing.
    blank = {"Cc", "Cf", "Mn", "Zl", "Zp", "Zs"}
    return any(unicodedata.category(character) not in blank for character in html.unescape(text))


def escaped(text: str) -> str:
    """Write lone surrogates (half a character, possible in JSON and in file names), which UTF-8 lacks, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _encoded(entries: Iterable[Item | Skipped], image_size: int, skipped: list[Skipped]) -> Iterator[_Sample]:
    """Read and encode the pictures; note what cannot be used in `skipped`."""
    for entry in entries:
        if isinstance(entry, Skipped):
            skipped.append(entry)
            continue
        try:
            data = entry.picture if isinstance(entry.picture, bytes) else entry.picture()
            image = _encode(data, image_size, entry.path)
        except (UserError, OSError) as error:
            skipped.append(Skipped(entry.path, f"unreadable picture: {error}"))
            continue
        yield _Sample(entry.path, entry.captions, image)


def _assign(samples: Iterable[_Sample], config: PackConfig) -> Iterator[tuple[str, _Sample]]:
    """Give each sample its split.

    By hash, "val" could stay empty. So until it has a sample, the one with the lowest hash so far is held back: it
    takes the place if nobody else does.
    """
    if config.split is not None or config.val_fraction == 0:
        yield from ((config.split or "train", sample) for sample in samples)
        return
    held: _Sample | None = None
    val_has_one = False
    for sample in samples:
        if hash_share(sample.path) < config.val_fraction:
            val_has_one = True
            yield "val", sample
        elif val_has_one or (held is not None and hash_share(held.path) < hash_share(sample.path)):
            yield "train", sample
        else:
            if held is not None:
                yield "train", held
            held = sample
    if held is not None:
        yield "train" if val_has_one else "val", held


def _encode(data: bytes, image_size: int, name: str) -> bytes:
    out = io.BytesIO()
    fit(open_rgb(data, name=name), image_size).save(out, "webp", quality=_QUALITY, method=4)
    return out.getvalue()


def _key(path: str) -> str:
    """A key that shows the path, and is unique whatever characters or folders it has."""
    readable = slug(path)[:_SLUG_LENGTH].strip("-")
    digest = sha256(path.encode()).hexdigest()[:12]
    return f"{readable}_{digest}" if readable else digest


def _kind(item: Skipped) -> str:
    return item.reason.split(":")[0]


def _nothing_to_train_on(where: str, usable: int, skipped: list[Skipped], config: PackConfig) -> str:
    shown = "".join(f"\n  {item.path}: {item.reason}" for item in skipped[:_SHOWN])
    needed = "" if config.split else ", and needs one to train on and one for val (val_fraction=0 for none)"
    return (
        f"{where} has {usable} usable pictures{needed}; left out {len(skipped)}{', among them' if shown else ''}{shown}"
    )
