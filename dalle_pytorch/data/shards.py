"""Tar shards in the WebDataset format: written deterministically, read by position.

A shard folder holds ``index.json`` and tar files ``{split}-{number:05d}.tar``. A sample is a pair of
neighbouring files in a tar, ``<key>.<webp|png|jpg>`` and ``<key>.json``. Any WebDataset reader can stream them;
`ShardDataset` reads them by position instead, so that a sampler can be exact and resumable.
"""

import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple

from torch.utils.data import Dataset
from webdataset import TarWriter

from dalle_pytorch.data.index import INDEX_NAME, INDEX_VERSION, SKIPPED_NAME, read_index
from dalle_pytorch.data.tar import GZIP_SUFFIX, TarReader
from dalle_pytorch.errors import UserError
from dalle_pytorch.files import ensure_empty, sha256_file, write_json

IMAGE_EXTENSIONS = ("webp", "png", "jpg")
# WebDataset splits a file name at its first dot, and "/" would make folders inside the tar.
_KEY = re.compile(r"[^./\\\s\x00]+")
_KEY_BYTES = 90  # a ustar name has 100, extension included
_SPLIT = re.compile(r"[A-Za-z0-9_]+")


class Sample(NamedTuple):
    """One picture as it lies in a shard: its key, its encoded bytes (or those of its tokens) and its JSON."""

    key: str
    image: bytes
    meta: dict[str, Any]


class _Entry(NamedTuple):
    """Where the two files of a sample lie: shard number, then (offset, size) in bytes of each."""

    shard: int
    key: str
    content: tuple[int, int]
    meta: tuple[int, int]


class ShardWriter:
    """Writes a shard folder; the same samples in the same order give the same bytes.

    Use it as a context manager. The index is written last, when the block ends without an error;
    after an error, a full disk for one, the files written so far are removed.

    Args:
        folder: where to write; must be absent or empty.
        name: name of the data set, for the index.
        image_size: side of the pictures in pixels, or None where they differ.
        samples_per_shard: the most samples in one tar.
        compress: write ``.tar.gz``. A tar spends 1.5 to 2 KB on a sample besides its bytes, more than a small
            picture takes; but a compressed shard is held in memory when it is read.
        source: free description of where the data come from, for the index.

    Raises:
        FileExistsError: the folder is not empty.
        UserError: `samples_per_shard` is not positive.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        name: str,
        image_size: int | None = None,
        samples_per_shard: int = 1000,
        compress: bool = False,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
        self.folder = Path(folder)
        ensure_empty(self.folder, "remove it or choose another out=")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.image_size = image_size
        self.samples_per_shard = samples_per_shard
        self.compress = compress
        self.source = dict(source or {})
        self._keys: set[str] = set()
        self._open: dict[str, tuple[TarWriter, ExitStack]] = {}
        self._counts: dict[str, list[int]] = {}  # split -> samples in each of its shards

    def __enter__(self) -> "ShardWriter":
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the index, or remove what was written if the block failed."""
        try:
            if kind is None:
                for split in list(self._open):
                    self._close(split)
                write_json(self.folder / INDEX_NAME, self.index())
                return
        except BaseException:
            self._remove()
            raise
        self._remove()

    def _remove(self) -> None:
        for split in list(self._open):
            with suppress(OSError):  # what cannot be written any more
                self._close(split)
        for file in (*(file for file, _, _ in self._shards()), SKIPPED_NAME):
            (self.folder / file).unlink(missing_ok=True)

    def write(self, split: str, key: str, image: bytes, ext: str, meta: Mapping[str, Any]) -> None:
        """Add one sample.

        Args:
            split: its split; letters, digits and "_".
            key: its name, unique in the folder; no dot, slash or white space.
            image: the encoded picture.
            ext: "webp", "png" or "jpg".
            meta: its JSON; "captions" (at least one), "concept" and "style" (text or None).
                "split" is added.

        Raises:
            ValueError: a bad or repeated key, a bad split or extension, no captions.
        """
        self._check(split, key, ext, meta)
        counts = self._counts.setdefault(split, [])
        if split not in self._open:
            counts.append(0)
            self._open[split] = self._open_shard(self.folder / self._name(split, len(counts) - 1))
        meta = {"concept": None, "style": None, **meta, "split": split}
        text = json.dumps(meta, ensure_ascii=False, sort_keys=True)
        self._open[split][0].write({"__key__": key, ext: image, "json": text.encode()})
        self._keys.add(key)
        counts[-1] += 1
        if counts[-1] == self.samples_per_shard:
            self._close(split)

    def _check(self, split: str, key: str, ext: str, meta: Mapping[str, Any]) -> None:
        if not _SPLIT.fullmatch(split):
            raise UserError(f"split {split!r} of {key!r}: use letters, digits and '_' only")
        if not _KEY.fullmatch(key):
            raise UserError(f"key {key!r} has a dot, a slash or white space; replace them")
        if len(key.encode()) > _KEY_BYTES:
            raise UserError(f"key {key!r} is longer than {_KEY_BYTES} bytes; shorten it")
        if key in self._keys:
            raise UserError(f"key {key!r} was written twice; keys must be unique in a folder")
        if ext not in IMAGE_EXTENSIONS:
            raise UserError(f"extension {ext!r} of {key!r} is not one of {IMAGE_EXTENSIONS}")
        captions = meta.get("captions")
        if not isinstance(captions, list) or not captions:
            raise UserError(f"sample {key!r} has no captions; give a list with at least one")
        if not all(isinstance(caption, str) and caption.strip() for caption in captions):
            raise UserError(f"sample {key!r} has an empty caption or one that is not text")

    def _open_shard(self, path: Path) -> tuple[TarWriter, ExitStack]:
        # Fixed owner, time and (for gzip) file name: the bytes depend on the samples alone.
        with ExitStack() as stack:
            stream: Any = stack.enter_context(path.open("wb"))
            if self.compress:
                stream = stack.enter_context(gzip.GzipFile("", "wb", compresslevel=9, fileobj=stream, mtime=0))
            tar = stack.enter_context(TarWriter(stream, user="", group="", mtime=0, encoder=False))
            return tar, stack.pop_all()

    def _close(self, split: str) -> None:
        _, stack = self._open.pop(split)
        stack.close()

    def _name(self, split: str, number: int) -> str:
        return f"{split}-{number:05d}.tar" + GZIP_SUFFIX * self.compress

    def _shards(self) -> Iterator[tuple[str, str, int]]:
        for split, counts in sorted(self._counts.items()):
            for number, count in enumerate(counts):
                yield self._name(split, number), split, count

    def index(self) -> dict[str, Any]:
        """Return the index of what has been written and closed."""
        shards = [
            {
                "file": file,
                "split": split,
                "count": count,
                "sha256": sha256_file(self.folder / file),
            }
            for file, split, count in self._shards()
        ]
        return {
            "kind": "images",
            "version": INDEX_VERSION,
            "name": self.name,
            "image_size": self.image_size,
            "splits": {split: sum(counts) for split, counts in sorted(self._counts.items())},
            "shards": shards,
            "source": self.source,
        }


class ShardDataset(Dataset[Sample]):
    """The samples of one split, or of several, by position; nothing is decoded.

    Opening it reads the tar headers only (and the whole of compressed shards). It may be shared by threads and
    forked, or sent to spawned, workers.

    Args:
        folder: a shard folder.
        split: the name of a split, or several joined by "+", as in "train+test".
        only: one of its files; the others are not opened.

    Raises:
        FileNotFoundError: the folder, its index or a shard is missing.
        ValueError: there is no such split, or a shard is truncated or does not match the index.
    """

    KIND: ClassVar[str] = "images"
    EXTENSIONS: ClassVar[tuple[str, ...]] = IMAGE_EXTENSIONS

    def __init__(self, folder: str | Path, split: str, *, only: str | None = None) -> None:
        self.folder = Path(folder)
        self.split = split
        self.index = read_index(self.folder, kind=self.KIND)
        self.image_size: int | None = self.index["image_size"]
        wanted = split.split("+")
        for name in wanted:
            if name not in self.index["splits"]:
                there = ", ".join(self.index["splits"])
                raise UserError(f"{self.folder} has no split {name!r}; it has: {there}")
        if repeated := [name for name, count in Counter(wanted).items() if count > 1]:
            raise UserError(f"split {split!r} names {repeated} more than once")
        chosen = [shard for name in wanted for shard in self.index["shards"] if shard["split"] == name]
        if only is not None:
            chosen = [shard for shard in chosen if shard["file"] == only]
        self.sha256 = hashlib.sha256("".join(shard["sha256"] for shard in chosen).encode()).hexdigest()
        """Of the checksums that the index has of the shards: tells these data from others."""
        self._tars = [TarReader(self.folder / shard["file"]) for shard in chosen]
        self._entries: list[_Entry] = []
        for number, shard in enumerate(chosen):
            entries = _list_samples(self._tars[number], number, self.EXTENSIONS)
            if len(entries) != shard["count"]:
                raise UserError(
                    f"{self._tars[number].path} holds {len(entries)} samples but the index says "
                    f"{shard['count']}: it is truncated or was changed; write the folder again"
                )
            self._entries += entries

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample at a position.

        Raises:
            IndexError: no such position.
            ValueError: its shard ends early or its JSON is broken; names the key and the shard.
        """
        entry = self._entries[index]
        return Sample(entry.key, self._read(entry, entry.content), self._meta(entry))

    def __iter__(self) -> Iterator[Sample]:
        """Yield the samples in order."""
        return (self[i] for i in range(len(self)))

    def meta(self, index: int) -> dict[str, Any]:
        """Return the JSON of a sample, without reading its picture."""
        return self._meta(self._entries[index])

    def metas(self) -> list[dict[str, Any]]:
        """Return the JSON of every sample, in order, without reading the pictures."""
        return [self._meta(entry) for entry in self._entries]

    def keys(self) -> list[str]:
        """Return the key of every sample, in order."""
        return [entry.key for entry in self._entries]

    def captions(self) -> list[list[str]]:
        """Return all captions of every sample, in order."""
        return [meta["captions"] for meta in self.metas()]

    def verify(self) -> None:
        """Compare the SHA-256 of every shard with the index.

        Raises:
            ValueError: a shard's bytes differ; names it.
        """
        expected = {shard["file"]: shard["sha256"] for shard in self.index["shards"]}
        for tar in self._tars:
            if sha256_file(tar.path) != expected[tar.path.name]:
                raise UserError(f"{tar.path} does not have the SHA-256 of the index; write it again")

    def _meta(self, entry: _Entry) -> dict[str, Any]:
        data = self._read(entry, entry.meta)
        try:
            return json.loads(data)
        except ValueError as error:
            path = self._tars[entry.shard].path
            raise UserError(f"the JSON of sample {entry.key!r} in {path} is broken: {error}") from error

    def _read(self, entry: _Entry, part: tuple[int, int]) -> bytes:
        try:
            return self._tars[entry.shard].read(*part)
        except UserError as error:
            raise UserError(f"sample {entry.key!r} cannot be read: {error}") from error


def _list_samples(tar: TarReader, shard: int, extensions: tuple[str, ...]) -> list[_Entry]:
    """Pair the files of one tar into samples."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    for name, offset, size in tar.scan():
        key, _, ext = name.partition(".")
        parts.setdefault(key, {})[ext] = offset, size
    entries = []
    for key, files in parts.items():
        contents = [ext for ext in files if ext in extensions]
        if len(contents) != 1 or "json" not in files:
            raise UserError(
                f"sample {key!r} in {tar.path} needs one of {extensions} and one json, but has {sorted(files)}"
            )
        entries.append(_Entry(shard, key, files[contents[0]], files["json"]))
    return entries
