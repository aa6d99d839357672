"""Packs what img2dataset downloaded: ``00000.tar`` and so on (webdataset), or ``00000/`` and so on (files).

A sample is a picture ``<key>.jpg`` (or .png, .webp), its caption ``<key>.txt`` and its metadata ``<key>.json``. What
could not be downloaded has no sample: img2dataset lists it in its parquet files, which are not read here.
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from dalle_pytorch.data.packing import Item, PackConfig, PackReport, Skipped, captions_of, escaped, pack
from dalle_pytorch.errors import UserError
from dalle_pytorch.images import IMAGE_SUFFIXES


class _File(NamedTuple):
    """A file of a shard: its name in there, and its content or where that is."""

    name: str
    content: bytes | Path

    @property
    def key(self) -> str:
        """The sample it belongs to: WebDataset splits a file name at its first dot."""
        folder, slash, file = self.name.rpartition("/")
        return folder + slash + file.partition(".")[0]

    @property
    def ext(self) -> str:
        """Of the name, with the dot, in lower case."""
        return self.name.removeprefix(self.key).lower()

    def read(self) -> bytes:
        """The content."""
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


def pack_img2dataset(path: str | Path, out: str | Path, config: PackConfig) -> PackReport:
    """Pack the output folder of img2dataset.

    The caption is that of the .txt; where there is none, "caption" of the .json. A picture is named by its shard and
    file, as in "00000/000000012.jpg", the same in both formats.

    Args:
        path: the folder; its tars are read, or if it has none, its subfolders.
        out: shard folder to write; absent or empty.
        config: size, splits and limits.

    Returns:
        The index and what was left out: samples without picture or caption, unreadable pictures, tars that break off
        (what is before the break is used).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has neither tars nor folders, or too little in it is usable.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no folder {path}: path must be the output folder of img2dataset")
    tars = sorted(path.glob("*.tar"))
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    if not tars and not folders:
        raise UserError(f"{path} has neither .tar files nor folders: path must be the output folder of img2dataset")
    entries = _from_tars(tars, folders) if tars else _from_folders(folders)
    name = path.resolve().name
    return pack(entries, Path(out), config, name=name, where=str(path), source={"format": "img2dataset"})


def _from_tars(tars: list[Path], folders: list[Path]) -> Iterator[Item | Skipped]:
    for tar in tars:
        breaks: list[Skipped] = []
        yield from _entries(tar.stem, _tar_files(tar, breaks))
        yield from breaks
    for folder in folders:
        yield Skipped(
            escaped(folder.name), "folder beside tars: only the tars are read; give a folder of its own as path"
        )


def _from_folders(folders: list[Path]) -> Iterator[Item | Skipped]:
    for folder in folders:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        yield from _entries(folder.name, (_File(escaped(file.name), file) for file in files))


def _tar_files(path: Path, breaks: list[Skipped]) -> Iterator[_File]:
    """Read the files of a tar one after the other; where it breaks off, stop and note it in `breaks`."""
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isfile() and (file := tar.extractfile(member)):
                    yield _File(escaped(member.name.removeprefix("./")), file.read())
            # tarfile takes a header cut short for the end; a whole tar ends with blocks of zeros.
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
    except tarfile.TarError as error:
        reason = f"truncated tar: {error}; what is before the break is used, download the rest again"
        breaks.append(Skipped(escaped(path.name), reason))


def _entries(shard: str, files: Iterator[_File]) -> Iterator[Item | Skipped]:
    seen: set[str] = set()
    for key, group in groupby(files, lambda file: file.key):
        path = f"{escaped(shard)}/{key}"
        if key in seen:
            yield Skipped(path, "repeated key: the shard has it more than once; the first counts")
            continue
        seen.add(key)
        yield from _sample(path, list(group))


def _sample(path: str, files: list[_File]) -> Iterator[Item | Skipped]:
    """Pair the pictures of a sample (there should be one) with its caption."""
    parts: dict[str, _File] = {}
    for file in files:
        if file.ext in parts:
            yield Skipped(path + file.ext, "repeated file: the sample has it more than once; the first counts")
        parts.setdefault(file.ext, file)
    pictures = [file for ext, file in parts.items() if ext in IMAGE_SUFFIXES]
    if not pictures:
        yield Skipped(path, "no picture: it has no file of an image format that is read")
        return
    try:
        captions = _captions(parts)
        reason = "no captions: neither its .txt nor its .json has one"
    except (ValueError, OSError) as error:
        captions, reason = [], f"unreadable captions: {error}"
    for picture in pictures:
        if captions:
            yield Item(path + picture.ext, captions, picture.read)
        else:
            yield Skipped(path + picture.ext, reason)


def _captions(files: dict[str, _File]) -> list[str]:
    text = files[".txt"].read().decode("utf-8-sig") if ".txt" in files else ""
    if captions := captions_of(text):
        return captions
    meta = json.loads(files[".json"].read()) if ".json" in files else None
    return captions_of(meta.get("caption")) if isinstance(meta, dict) else []
