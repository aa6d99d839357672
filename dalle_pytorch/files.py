"""Files written whole or not at all, texts in any encoding, hashes, and folders that must not hold anything yet."""

import codecs
import contextlib
import csv
import hashlib
import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import UserError, first_line

MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # begins with UTF-16's mark
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks that a text may begin with, and its encoding; UTF-8's is no more than a habit of editors."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends, and is removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's files are readable by their owner only
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, in whole: what cannot be finished is removed.

    Raises:
        FileExistsError: the file is there already.
        OSError: it cannot be written; names the file.
    """
    file = path.open("xb")
    try:
        with file:
            file.write(content)
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write readable, deterministic JSON in one step."""
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.
        UserError: not JSON, or no object; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: truncated or damaged ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: no JSON object")
    return content


def read_text(path: Path, name: str) -> str:
    """A text of a file or a pipe: UTF-8, with a byte order mark or without, or UTF-16 or UTF-32 with one.

    Args:
        path: where it is.
        name: what errors call it.

    Raises:
        FileNotFoundError: no such file.
        UserError: bytes that are no such text.
    """
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    content = path.read_bytes()
    encoding = next((known for mark, known in MARKS.items() if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        plain = encoding.removesuffix("-sig").upper()
        raise UserError(f"{name} is no text in {plain}, see its byte {error.start + 1}: save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{name} holds NUL characters, as UTF-16 without a byte order mark does: save it as UTF-8")
    return text


def is_unicode(text: str) -> bool:
    """Whether a text has no surrogates, by which Python shows bytes of a command line that it cannot decode."""
    return text.encode("utf-8", "ignore").decode() == text


def split_lines(text: str) -> list[str]:
    """The lines of a text file: only \\n, \\r\\n and \\r end one, not all that ends one for ``str.splitlines``."""
    lines = re.split(r"\r\n?|\n", text)
    return lines if lines[-1] else lines[:-1]


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def ensure_empty(
    folder: Path, advice: str = "choose another out=", *, ignore: Callable[[Path], bool] | None = None
) -> None:
    """Refuse a path that is a file, or a folder that holds files.

    Args:
        folder: to be written; may be absent.
        advice: what the message proposes.
        ignore: entries that may be there.

    Raises:
        FileExistsError: it holds files.
    """
    if not folder.exists():
        return
    if not folder.is_dir() or any(ignore is None or not ignore(path) for path in folder.iterdir()):
        raise FileExistsError(f"{folder} exists and holds files; nothing is overwritten: {advice}")


def make_folder(out: str | None, runs: str) -> Path:
    """Make the folder of a run.

    Args:
        out: the folder, which must not hold files; None = a new one in ``runs``.
        runs: parent of such folders: each is named after the time, and has a number where two runs begin in one second.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``out`` holds files.
    """
    if out is not None:
        folder = Path(out)
        ensure_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    Path(runs).mkdir(parents=True, exist_ok=True)
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for suffix in itertools.chain([""], (f"_{number}" for number in itertools.count(2))):
        folder = Path(runs, f"{stamp}{suffix}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("numbers do not end")


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, with the names of its columns where the file is new."""
    text = io.StringIO()
    writer = csv.DictWriter(text, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)
        file.write(text.getvalue())
