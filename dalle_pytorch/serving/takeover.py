"""Takes over the library of a playground: a folder for each prompt, with its images and an .idx file of JSON."""

import json
import logging
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from dalle_pytorch.errors import UserError, first_line
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.images import open_rgb
from dalle_pytorch.serving.ledger import Ledger, NewImage
from dalle_pytorch.serving.library import Library

log = logging.getLogger(__name__)
MODEL = "playground"
"""What stands for the hash of the weights, which nobody knows."""


class Taken(NamedTuple):
    """What was found."""

    images: int
    """Images entered."""
    known: int
    """Images that were here before."""
    unreadable: list[str]
    """What could not be read, and why; left as it is."""

    def __str__(self) -> str:
        """For people."""
        lines = [f"{self.images} images entered, {self.known} were here already"]
        return "\n".join([*lines, *(f"not read: {text}" for text in self.unreadable)])


def take_over(folder: Path, ledger: Ledger, library: Library, owner: str) -> Taken:
    """Copy a playground's images into the library; their addresses ``library/<queue_id>/<uuid>.png`` stay.

    Args:
        folder: the playground's ``library``; nothing in it is changed.
        ledger: where the rows go.
        library: where the files go.
        owner: whose they are from now on.

    Raises:
        UserError: there is no such folder, or none of a prompt in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the playground's library")
    indices = sorted(folder.glob("*/*.idx"), key=lambda path: path.stat().st_mtime)
    if not indices:
        raise UserError(f"{folder} holds no prompt's folder with an .idx file: name the playground's library")
    taken, known, unreadable = 0, ledger.image_ids(), list[str]()
    before = 0
    for index in indices:
        try:
            job, parameters, seconds = _read(index)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            unreadable.append(f"{index}: {first_line(error)}")
            continue
        created = index.stat().st_mtime
        files = sorted(index.parent.glob("*.png"))
        parameters |= {"indices": list(range(len(files))), "keep": len(files)}
        for place, file in enumerate(files):
            try:
                name = uuid.UUID(file.stem).hex
                if name in known:
                    before += 1
                    continue
                image = open_rgb(file.read_bytes(), name=str(file))
            except (OSError, ValueError) as error:
                unreadable.append(f"{file}: {first_line(error)}")
                continue
            row = NewImage(name, place, parameters["prompt"], parameters["seed"], place, None, MODEL, parameters)
            notes = {**row._asdict(), "job": job, "owner": owner, "created": created}
            library.add(image, notes, name=name)
            ledger.adopt(job, owner, created, row, seconds=seconds)
            taken += 1
    return Taken(taken, before, unreadable)


def _read(index: Path) -> tuple[str, dict[str, Any], float]:
    """Job, parameters and seconds of an .idx file."""
    found = json.loads(index.read_text(encoding="utf-8"))
    seed = int(found.get("seed") or 0)
    asked = {"top_k": "gen_top_k", "top_p": "gen_top_p", "temperature": "temperature", "cfg_scale": "condition_scale"}
    values: dict[str, Any] = {name: float(found[old]) for name, old in asked.items() if found.get(old) is not None}
    if "top_k" in values:
        values["top_k"] = int(values["top_k"])
    parameters = {
        "prompt": str(found["text_prompt"]), "seed": seed, "negative_prompt": "",
        "sampling": asdict(SamplingConfig(**values)),
    }  # fmt: skip
    return uuid.UUID(index.stem).hex, parameters, float(found.get("time_taken") or 0.0)
