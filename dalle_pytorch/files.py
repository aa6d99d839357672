"""Files written whole or not at all, their hashes, and folders that must not hold anything yet."""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import UserError, first_line


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
