"""One arm of an experiment with one seed: where it works, its trainings, its result."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dalle_pytorch.config import CONFIGS
from dalle_pytorch.errors import UserError
from dalle_pytorch.files import atomic

T = TypeVar("T")

RUNS = {
    "vae": "image_tokenizers:run",
    "dalle": "dalles:run",
    "clip": "clips:run",
    "underflow": "underflow:run",
    "powersgd": "powersgd:run",
    "drawn": "drawn:run",
}
"""What an arm can do: a module of this package and its function from a ``Job`` to a ``Result``. A module may also have
``prepare(shared, seeds, jobs)``, called before all arms, for what they share."""

KINDS = ("vae", "dalle", "clip")
"""What our commands train."""
TAIL = 15
"""Lines of a failed training's log in the error."""


class ArmError(UserError):
    """An arm that could not be run to its end."""


class Curve(NamedTuple):
    """A row of numbers, such as a loss over steps."""

    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Result:
    """What an arm gives for a seed."""

    numbers: Mapping[str, float]
    curves: Mapping[str, Curve] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """An arm with one seed."""

    run: str
    """One of RUNS."""
    settings: tuple[str, ...]
    """Settings of the run or of its training, as on a command line."""
    seed: int
    """Of everything random in it."""
    folder: Path
    """Its own."""
    shared: Path
    """Folder of what all experiments share, as a trained image tokenizer."""
    threads: int
    """CPU threads that it may use."""

    def describe(self) -> dict[str, Any]:
        """What its result depends on."""
        return {"run": self.run, "settings": list(self.settings), "seed": self.seed, "recipes": recipes()}


def recipes() -> str:
    """A short hash of ``experiment=replicate`` of the three trainings: results of other recipes are not these."""
    parts = [(CONFIGS / f"train_{kind}/experiment/replicate.yaml").read_bytes() for kind in KINDS]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


def function(run: str, name: str) -> Callable[..., Any] | None:
    """A function of the module of a run; None where it has none.

    Raises:
        UserError: no such run.
    """
    if run not in RUNS:
        raise UserError(f"run={run} is unknown; there are {', '.join(RUNS)}")
    module, _, main = RUNS[run].partition(":")
    found = import_module(f"replication.{module}")
    return getattr(found, main if name == "run" else name, None)


def perform(job: Job) -> Result:
    """Run a job, or read its result where it ended before.

    Raises:
        UserError: the folder holds the result of other settings.
        ArmError: a training failed; with the end of its log.
    """
    path = job.folder / "result.json"
    if path.is_file():
        return read(job)
    torch.set_num_threads(job.threads)
    started = time.monotonic()
    run = function(job.run, "run")
    assert run is not None
    result: Result = run(job)
    curves = {name: {"x": list(curve.x), "y": list(curve.y)} for name, curve in result.curves.items()}
    content = {
        **job.describe(),
        "numbers": dict(result.numbers),
        "curves": curves,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "threads": job.threads,
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return read(job)


def read(job: Job) -> Result:
    """The result of a job that has ended.

    Raises:
        UserError: it is of other settings; names both.
    """
    content = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
    for key, wanted in job.describe().items():
        if content[key] != wanted:
            raise UserError(
                f"{job.folder} holds a result with {key} {content[key]}, now it is {wanted}: "
                "choose another out=, or delete that folder to run it anew"
            )
    return Result(content["numbers"], {name: Curve(**curve) for name, curve in content["curves"].items()})


def train(kind: str, settings: Sequence[str], seed: int, folder: Path, threads: int) -> Path:
    """Train a model with its command, in a process of its own; one that was interrupted goes on.

    Args:
        kind: vae, dalle or clip.
        settings: of the command.
        seed: of the training.
        folder: of the run; ``log.txt`` beside it has what it printed.
        threads: CPU threads.

    Returns:
        The trained weights.

    Raises:
        ArmError: it failed; with the end of its log. Or the folder is of a training with other settings.
    """
    result, note = folder / f"{kind}.safetensors", folder.with_name(f"{folder.name}.json")
    wanted = {"kind": kind, "settings": list(settings), "seed": seed, "recipes": recipes()}
    if note.is_file():
        if json.loads(note.read_text(encoding="utf-8")) != wanted:
            raise ArmError(f"{folder} was trained with other settings, see {note}: choose another out=, or delete both")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic(note) as temporary:
            temporary.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    if not result.is_file():
        command(
            f"train_{kind}",
            [*settings, f"seed={seed}", f"out={folder}", "resume=true", "logger=none", "trainer.accelerator=cpu",
             "trainer.enable_progress_bar=false"],
            folder.with_name(f"{folder.name}.log"), threads,
        )  # fmt: skip
    return result


def command(name: str, settings: Sequence[str], log: Path, threads: int) -> None:
    """Run one of our commands in a process of its own; what it prints is added to ``log``.

    Raises:
        ArmError: it failed; with the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, "-m", f"dalle_pytorch.commands.{name}", *settings]
    with log.open("a", encoding="utf-8") as output:
        ended = subprocess.run(
            line, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
        )  # fmt: skip
    if ended.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
        raise ArmError(f"{' '.join(line)} failed with {ended.returncode}:\n" + "\n".join(tail))


def settings_of(cls: type[T], settings: Sequence[str]) -> T:
    """A run's own dataclass from ``name=value`` settings.

    Raises:
        UserError: an unknown name or a value that does not fit.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), OmegaConf.from_dotlist(list(settings)))
        found = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(f"{' '.join(settings)}: {str(error).splitlines()[0]}") from error
    assert isinstance(found, cls)
    return found


def threads_of(jobs: int) -> int:
    """CPU threads for each of so many at a time."""
    return max(1, (os.cpu_count() or 1) // jobs)


def slug(arm: str) -> str:
    """A folder's name for an arm: ``1/16`` would be two."""
    return re.sub(r"[^\w.+=-]+", "_", arm)
