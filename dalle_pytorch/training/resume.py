"""Where a run goes on: its checkpoints, damaged ones recognised, and settings that changed since."""

import logging
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dalle_pytorch.checkpoints.checkpoint import SHARDED_META
from dalle_pytorch.errors import UserError

log = logging.getLogger(__name__)

# Settings that say how a run is carried out, not what it computes.
HOW_TO_RUN = ("resume", "out", "logger", "trainer.enable_progress_bar", "trainer.log_every_n_steps", "data.num_workers",
              "data.verify", "data.prefetch_factor", "data.micro_batch_size", "callbacks.checkpoint_every",
              "callbacks.keep_last", "callbacks.keep_every")  # fmt: skip


def checkpoint_path(folder: Path, step: int) -> Path:
    """Name of the checkpoint after so many steps."""
    return folder / f"step_{step:08d}.ckpt"


def find_last(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None where there is none at all.

    A checkpoint is a zip file with a checksum of each tensor (a folder, if sharded). Damaged ones are passed over with
    a warning.

    Raises:
        ValueError: there are checkpoints and all are damaged; names them.
    """
    found = sorted(folder.glob("step_*.ckpt"), reverse=True)
    reasons = []
    for path in found:
        reason = checkpoint_error(path)
        if reason is None:
            if reasons:
                log.warning("DAMAGED CHECKPOINT: %s; going on from %s instead", "; ".join(reasons), path.name)
            return path
        reasons.append(f"{path.name} {reason}")
    if found:
        raise UserError(f"no checkpoint in {folder} is whole: {'; '.join(reasons)}. Start anew with another out=")
    return None


def checkpoint_error(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    if path.is_dir():  # sharded: what is not sharded is written last
        if not (path / ".metadata").is_file() or not (path / SHARDED_META).is_file():
            return "is incomplete"
        path = path / SHARDED_META
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"is truncated ({error})"
    return None if bad is None else f"has another checksum in {bad}"


def prune(folder: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove all but the newest checkpoints, and those of every ``keep_every`` steps (0 = none)."""
    found = {int(path.stem.removeprefix("step_")): path for path in folder.glob("step_*.ckpt")}
    old = sorted(step for step in found if not keep_every or step % keep_every)[:-keep_last]
    for path in (found[step] for step in old):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill in the middle of writing a checkpoint left."""
    for path in folder.glob(".*.tmp"):
        path.unlink()


def warn_of_changes(saved: Path, now: dict[str, Any]) -> None:
    """Tell which settings differ from those that a run began with; it goes on with the new ones.

    Not those of the model: ``Run.check`` refuses other ones. Nor settings that one of two versions does not have.
    """
    before: Any = OmegaConf.to_container(OmegaConf.load(saved))
    trainer = {"trainer": before["trainer"]}, {"trainer": now["trainer"]}  # its settings are added with a plus
    changes = [
        f"{key} was {old}, is {new}"
        for pair in ((common(before, now), common(now, before)), trainer)
        for key, old, new in differences(*pair)
        if not any(key == name or key.startswith(name + ".") for name in (*HOW_TO_RUN, "model"))
    ]
    if changes:
        log.warning("resumed with other settings: %s", "; ".join(dict.fromkeys(changes)))


def common(settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The nested settings whose keys the other ones have too."""
    return {
        key: common(value, other[key]) if isinstance(value, dict) and isinstance(other[key], dict) else value
        for key, value in settings.items()
        if key in other
    }


def differences(before: Any, now: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys of nested settings that differ, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from differences(before.get(key), now.get(key), f"{prefix}{key}.")
    elif before != now:
        yield prefix.rstrip("."), before, now
