"""The index of a shard folder, and the hashes that fix splits and check files."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

INDEX_NAME = "index.json"
INDEX_VERSION = 1
KINDS = ("images", "tokens")
_READ_SIZE = 1 << 20  # bytes per read when a file is hashed


def hash_share(text: str) -> float:
    """Map a text to [0, 1) by its SHA-256: the same on every machine, even over all texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_SIZE):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write readable, deterministic JSON in one step: the file is there whole or not at all."""
    text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_index(folder: str | Path, *, kind: str | None = "images") -> dict[str, Any]:
    """Read and check the index of a shard folder.

    Args:
        folder: a shard folder.
        kind: what the shards must hold, "images" or "tokens"; None = either.

    Returns:
        The parsed ``index.json``.

    Raises:
        FileNotFoundError: no such folder, or it has no index.
        ValueError: the index is unreadable, or of another kind or version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no shard folder {folder}: write one with prepare_data.py")
    path = folder / INDEX_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {INDEX_NAME}: not a shard folder, or its writing was interrupted; "
            "write it again with prepare_data.py"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        found = index["kind"], index["version"]
        missing = {"name", "image_size", "splits", "shards"} - index.keys()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a shard index ({error!r}); write it again") from error
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}; write it again with prepare_data.py")
    if found[0] not in ([kind] if kind else KINDS) or found[1] != INDEX_VERSION:
        raise ValueError(
            f"{path} holds {found[0]!r} version {found[1]}, but {kind or KINDS} version {INDEX_VERSION} is needed"
        )
    return index
