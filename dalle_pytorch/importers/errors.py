"""Words of error messages, and the reading of JSON, which all importers share."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn


def refuse(path: Path, why: str) -> NoReturn:
    """End an import with one line that names the file.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{path}: {why}")


def some(names: Iterable[str]) -> str:
    """A few names for an error message."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or no object; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: truncated or damaged ({first_line(error)})") from error
    if not isinstance(content, dict):
        refuse(path, "no JSON object")
    return content
