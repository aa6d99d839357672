"""The loggers of a run; after an interruption they go on in the same files."""

import csv
import inspect
import os
import uuid
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

from dalle_pytorch.config import build, target_of


def make_loggers(sections: dict[str, Any], out: Path, *, step: int = 0) -> list[Any]:
    """The loggers of a run.

    W&B is online where a person has logged in (``wandb login``, WANDB_API_KEY), else offline; ``offline`` of its
    section and WANDB_MODE have the last word.

    Args:
        sections: by name, each with ``_target_``.
        out: folder of the run.
        step: steps that the checkpoint has from which the run goes on; what was logged after it is dropped.

    Raises:
        ConfigError: a logger's class or argument does not exist.
    """
    loggers = []
    for name, section in sections.items():
        extra: dict[str, Any] = {"save_dir": str(out)}
        if section.get("_target_", "").endswith("WandbLogger"):
            import wandb  # half a second, and few runs need it

            if "WANDB_MODE" not in os.environ:
                offline = section.get("offline", not wandb.login(prompt=False, verify=False))
                # as ``mode``: for ``offline`` Lightning sets a variable, which the next run of a sweep would find
                extra |= {"offline": False, "mode": "offline" if offline else "online"}
            extra |= {"id": _wandb_id(out), "resume": "allow"}
        elif name in ("csv", "tensorboard"):
            extra["version"] = 0
        else:  # one of the user's own, which may not take a folder
            parameters = inspect.signature(target_of(section, f"logger.{name}")).parameters
            extra = {key: value for key, value in extra.items() if key in parameters}
        if name == "tensorboard" and step:
            extra["purge_step"] = step  # TensorBoard hides what an interrupted run logged after its checkpoint
        rows = _rows(out / "csv" / "version_0" / "metrics.csv", step) if name == "csv" and step else []
        logger = build(section, f"logger.{name}", **extra)
        if rows and hasattr(logger.experiment, "metrics_file_path"):  # the first process
            logger.experiment.metrics = rows
            logger.experiment.save()
        loggers.append(logger)
    return loggers


def _rows(path: Path, step: int) -> list[dict[str, str]]:
    """What was logged before a step; Lightning starts the file anew."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if int(row["step"]) < step]


def _wandb_id(out: Path) -> str:
    """The id under which Weights & Biases knows this run, made at its first start."""
    path = out / "wandb_id.txt"
    if path.is_file():
        return path.read_text()
    name = uuid.uuid4().hex[:8]
    if not getattr(rank_zero_only, "rank", 0):  # the others log nothing
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return name
