"""Packs what img2dataset downloaded: ``00000.tar`` and so on (webdataset), or ``00000/`` and so on (files).

A sample is an image ``<key>.jpg`` (or of another format), its caption ``<key>.txt`` and its metadata ``<key>.json``.
What could not be downloaded has no sample: img2dataset lists it in its parquet files, which are not read here.
"""

import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dalle_pytorch.data.packing import Item, PackConfig, PackReport, Skipped, captions_of, escaped, pack
from dalle_pytorch.data.walk import walk
from dalle_pytorch.errors import UserError, first_line
from dalle_pytorch.images import IMAGE_SUFFIXES

_TAR = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz)$", re.IGNORECASE)
_BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)


class _File(NamedTuple):
    """A file of a shard: its name in there, and how to read it."""

    name: str
    read: Callable[[], bytes]

    @property
    def key(self) -> str:
        """The sample it belongs to: its name without the suffix, so that "holiday.001.jpg" is one of its own."""
        return self.name.removesuffix(PurePosixPath(self.name).suffix)

    @property
    def suffix(self) -> str:
        """With the dot, in lower case."""
        return PurePosixPath(self.name).suffix.lower()


def pack_img2dataset(path: str | Path, out: str | Path, config: PackConfig) -> PackReport:
    """Pack the output folder of img2dataset.

    The caption is that of the .txt; where there is none, "caption" of the .json. An image is named by its shard and
    file, as in "00000/000000012.jpg", the same in both formats.

    Args:
        path: the folder. The tars in it and in its subfolders are read, compressed or not and in any order of their
            files; if there are none, the files of its subfolders.
        out: shard folder to write; absent or empty.
        config: size, splits and limits.

    Returns:
        The index and what was left out: samples without image or caption, unreadable images, images beside tars, tars
        that break off (what is before the break is used).

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: it has neither tars nor folders, or too little in it is usable.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: path must be the output folder of img2dataset")
    unreadable: list[Skipped] = []
    folders = list(walk(path, unreadable))
    tars = [folder / name for folder, names in folders for name in names if _TAR.search(name)]
    if not tars and len(folders) == 1 and not unreadable:
        raise UserError(f"{path} has neither .tar files nor folders: path must be the output folder of img2dataset")
    entries = chain(unreadable, _from_tars(path, tars, folders) if tars else _from_folders(path, folders))
    name = path.resolve().name
    return pack(entries, Path(out), config, name=name, where=str(path), source={"format": "img2dataset"})


def _from_tars(path: Path, tars: list[Path], folders: list[tuple[Path, list[str]]]) -> Iterator[Item | Skipped]:
    shards: set[str] = set()
    for tar in tars:
        shard = _TAR.sub("", _relative(path, tar))
        entries = _from_tar(tar, shard, _relative(path, tar))
        if shard in shards:  # 00000.tar and 00000.tar.gz
            reason = f"repeated tar: another {shard} is read; rename {tar.name} or remove it"
            entries = (Skipped(f"{tar.name}: {entry.path}", reason) for entry in entries)
        shards.add(shard)
        yield from entries
    yield from _beside(path, folders, "image beside tars: only the tars are read; give its folder as path of its own")


def _from_folders(path: Path, folders: list[tuple[Path, list[str]]]) -> Iterator[Item | Skipped]:
    for folder, names in folders[1:]:
        files = [_File(escaped(name), (folder / name).read_bytes) for name in names]
        yield from _entries(_relative(path, folder), files)
    yield from _beside(path, folders[:1], "image beside folders: only subfolders are read; move it into one")


def _beside(path: Path, folders: Iterable[tuple[Path, list[str]]], reason: str) -> Iterator[Skipped]:
    for folder, names in folders:
        for name in names:
            if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Skipped(_relative(path, folder / name), reason)


def _from_tar(path: Path, shard: str, name: str) -> Iterator[Item | Skipped]:
    """The samples of a tar; where it breaks off, stop and name it. Images are read one at a time, in their order."""
    files: list[_File] = []
    try:
        with tarfile.open(path) as tar:
            broken = _list(tar, files)
            yield from _entries(shard, files)
    except _BROKEN as error:  # no header to begin with
        broken = first_line(error)
    except OSError as error:  # not gzip, or damaged; an error of the system has a number
        if error.errno is not None:
            raise
        broken = first_line(error)
    if broken is not None:
        yield Skipped(name, f"broken tar: {broken}; what is before the break is used, download it again")


def _list(tar: tarfile.TarFile, files: list[_File]) -> str | None:
    """Find the files of a tar, captions and metadata with their content; returns why it breaks off, if it does."""
    try:
        for member in tar:
            if member.isfile():
                name, read = escaped(member.name.removeprefix("./")), partial(_member, tar, member)
                if PurePosixPath(name).suffix.lower() in (".txt", ".json"):
                    read = partial(bytes, read())
                files.append(_File(name, read))
        # tarfile takes a header cut short for the end; a whole tar ends with blocks of zeros.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        return None if tar.fileobj.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else "it has no end mark"
    except (*_BROKEN, UserError) as error:
        return first_line(error)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    try:
        file = tar.extractfile(member)
        assert file is not None
        return file.read()
    except _BROKEN as error:
        raise UserError(f"the tar breaks off in {member.name}: {first_line(error)}") from error


def _entries(shard: str, files: list[_File]) -> Iterator[Item | Skipped]:
    """Group the files by sample, wherever in the shard they are."""
    samples: dict[str, dict[str, _File]] = {}
    for file in files:
        parts = samples.setdefault(file.key, {})
        if file.suffix in parts:
            reason = "repeated file: the shard has it more than once; the first counts"
            yield Skipped(f"{escaped(shard)}/{file.key}{file.suffix}", reason)
        parts.setdefault(file.suffix, file)
    for key, parts in samples.items():
        folder, slash, name = key.rpartition("/")
        whole = samples.get(f"{folder}{slash}{name.partition('.')[0]}")
        if whole is not None and whole is not parts and _is_whole(whole) and not _is_whole(parts):
            continue  # another file of that sample, such as "0001.mask.png" of "0001"
        yield from _sample(f"{escaped(shard)}/{key}", parts)


def _is_whole(parts: dict[str, _File]) -> bool:
    """Whether a sample has an image and a caption."""
    return not IMAGE_SUFFIXES.isdisjoint(parts) and not {".txt", ".json"}.isdisjoint(parts)


def _sample(path: str, parts: dict[str, _File]) -> Iterator[Item | Skipped]:
    """Pair the images of a sample (there should be one) with its caption."""
    images = [file for suffix, file in parts.items() if suffix in IMAGE_SUFFIXES]
    if not images:
        if ".txt" in parts or ".json" in parts:
            yield Skipped(path, "no image: it has no file of an image format that is read")
        return
    try:
        captions = _captions(parts)
        reason = "no captions: neither its .txt nor its .json has one"
    except (UserError, OSError) as error:
        captions, reason = [], f"unreadable captions: {error}"
    for image in images:
        if captions:
            yield Item(path + image.suffix, captions, image.read)
        else:
            yield Skipped(path + image.suffix, reason)


def _captions(files: dict[str, _File]) -> list[str]:
    try:
        text = files[".txt"].read().decode("utf-8-sig") if ".txt" in files else ""
        if captions := captions_of(text):
            return captions
        meta = json.loads(files[".json"].read()) if ".json" in files else None
    except ValueError as error:  # bytes that are no UTF-8, or no JSON
        raise UserError(first_line(error)) from error
    return captions_of(meta.get("caption")) if isinstance(meta, dict) else []


def _relative(path: Path, file: Path) -> str:
    return escaped(file.relative_to(path).as_posix())
