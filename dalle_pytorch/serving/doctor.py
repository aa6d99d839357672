"""Brings table and files of a library together again: after a lost database, a deleted file, a killed worker."""

import logging
from typing import Any, NamedTuple

from dalle_pytorch.errors import first_line
from dalle_pytorch.serving.ledger import DONE, Ledger, NewImage
from dalle_pytorch.serving.library import Library

log = logging.getLogger(__name__)
HOUR = 3600.0


class Repairs(NamedTuple):
    """What was found and mended."""

    adopted: int
    """Images whose rows were lost: written anew from the notes in their files."""
    removed: int
    """Files that an interrupted attempt has left behind, deleted: its job was drawn again or has failed."""
    forgotten: int
    """Rows whose files are gone, deleted."""
    unreadable: list[str]
    """Files that are no images of this server; left as they are."""

    def __str__(self) -> str:
        """For people."""
        lines = [
            f"{self.adopted} images entered from their files",
            f"{self.removed} left-over files deleted",
            f"{self.forgotten} rows without a file deleted",
            *(f"{path}: not readable, left" for path in self.unreadable),
        ]
        return "\n".join(lines)


def repair(ledger: Ledger, library: Library) -> Repairs:
    """Check every file and every row; works beside a running server.

    Args:
        ledger: of the library, perhaps empty.
        library: the images.
    """
    known = ledger.image_ids()
    adopted, removed, unreadable = 0, 0, []
    files, found = library.ids(), list[tuple[float, str, str, NewImage]]()
    for image in files:
        if image in known:
            continue
        try:
            notes = library.notes(image)
            values: dict[str, Any] = {name: notes[name] for name in NewImage._fields}
            values["id"] = image
            row = NewImage(**values)
            job, owner, created = str(notes["job"]), str(notes["owner"]), float(notes["created"])
            len(row.parameters["indices"])
        except (OSError, SyntaxError, KeyError, TypeError, ValueError) as error:
            unreadable.append(str(library.path(image)))
            log.warning("%s: %s", image, first_line(error))
            continue
        found.append((created, job, owner, row))
    for created, job, owner, row in sorted(found, key=lambda each: each[0]):
        image, state = row.id, ledger.state(job)
        if state is None or ledger.is_adopted(job):
            ledger.adopt(job, owner, created, row)
            adopted += 1
        elif state in DONE and image not in ledger.image_ids([image]):  # it may have been finished since
            library.delete(image)
            removed += 1
    removed += library.delete_halves(older_than=HOUR)
    lost = known - set(files)
    for image in lost:
        ledger.forget(image)
    return Repairs(adopted, removed, len(lost), unreadable)
