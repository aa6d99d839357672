"""The index of a shard folder, and the hash that fixes splits."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import UserError

INDEX_NAME = "index.json"
INDEX_VERSION = 1
SKIPPED_NAME = "skipped.json"  # beside it: what was left out, and why
KINDS = ("images", "tokens")


def hash_share(text: str) -> float:
    """Map a text to [0, 1) by its SHA-256: the same on every machine, even over all texts."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


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
        raise UserError(f"{path} is not a shard index ({error!r}); write it again") from error
    if missing:
        raise UserError(f"{path} lacks {sorted(missing)}; write it again with prepare_data.py")
    if found[0] not in ([kind] if kind else KINDS) or found[1] != INDEX_VERSION:
        raise UserError(
            f"{path} holds {found[0]!r} version {found[1]}, but {kind or KINDS} version {INDEX_VERSION} is needed"
        )
    return index
