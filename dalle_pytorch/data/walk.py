"""Walks through a folder of people's files, links to folders included."""

import os
from collections.abc import Iterator
from pathlib import Path

from dalle_pytorch.data.packing import Skipped, escaped


def walk(path: Path, unreadable: list[Skipped]) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below one, itself first, each once, with the sorted names of its files.

    Links to folders are followed. A folder that has a place of its own below ``path`` is read there rather than
    through a link.

    Args:
        path: where to begin.
        unreadable: takes the folders that may not be read.
    """

    def note(error: OSError) -> None:
        name = escaped(Path(error.filename).relative_to(path).as_posix())
        unreadable.append(Skipped(name, f"unreadable folder: {error.strerror}"))

    root, seen = path.resolve(), set[Path]()
    for folder, subfolders, names in os.walk(path, onerror=note, followlinks=True):
        place = Path(folder)
        real = place.resolve()
        if real in seen or (place != path and place.is_symlink() and real.is_relative_to(root)):
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        yield place, sorted(names)
