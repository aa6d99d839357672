"""Hands a training to a scheduler instead of running it: SLURM, or a background process of this machine."""

import importlib
import importlib.util
import logging
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle_pytorch.errors import UserError
from dalle_pytorch.training.resume import claim, default_folder

if TYPE_CHECKING:
    from dalle_pytorch.training.run import RunConfig

log = logging.getLogger(__name__)

CLUSTERS = ("slurm", "local")
MOST_TURNS = 1000  # times that a job asks for another turn after its time was up


@dataclass(kw_only=True)
class LauncherConfig:
    """What to ask SLURM for. Nodes and processes per node are trainer.num_nodes and trainer.devices."""

    cluster: str | None = None
    """"slurm", "local" (a process in the background), or null: run here and now."""
    timeout_min: int = 24 * 60
    """Minutes until the job is stopped; it saves and asks for another turn before."""
    cpus_per_task: int = 8
    """Cores of each process."""
    mem_gb: int | None = None
    """Memory of each node; null = the cluster's default."""
    gpus_per_node: int | None = None
    """null = as many as processes, none with trainer.accelerator=cpu."""
    partition: str | None = None
    """SLURM's; this and the next three: null = the cluster's default."""
    account: str | None = None
    """Whom the time is charged to."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the job, such as "module load cuda"."""
    signal_delay_s: int = 120
    """Seconds between the warning and the end."""
    additional: dict[str, Any] = field(default_factory=dict)
    """Other options of sbatch, by their long names."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: an unknown cluster, or a time or size below 1; names it.
        """
        if self.cluster is not None and self.cluster not in CLUSTERS:
            raise UserError(f"launcher.cluster must be one of {', '.join(CLUSTERS)} or null, got {self.cluster!r}")
        for name in ("timeout_min", "cpus_per_task", "signal_delay_s"):
            if getattr(self, name) < 1:
                raise UserError(f"launcher.{name} must be at least 1, got {getattr(self, name)}")


class Job:
    """A command that a scheduler can run, and run again: it continues from its last checkpoint.

    Args:
        module: of the command, with ``main()``.
        arguments: of the command line.
    """

    def __init__(self, module: str, arguments: list[str]) -> None:
        self.module, self.arguments = module, arguments

    def __call__(self) -> None:
        """Run it."""
        sys.argv = [self.module, *self.arguments]
        importlib.import_module(self.module).main()

    def checkpoint(self) -> Any:
        """What submitit runs when the job gets another turn: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def launch(kind: str, config: "RunConfig", module: str) -> bool:
    """Hand the command of this process to a scheduler, if the settings say so.

    Args:
        kind: vae, dalle or clip.
        config: settings.
        module: of the command.

    Returns:
        Whether it was submitted, and there is nothing left to do here.

    Raises:
        FileExistsError: the folder holds files and ``resume`` is off.
        ValueError: submitit is missing, or the number of processes per node is not given.
    """
    cluster = config.launcher.cluster
    if cluster is None:
        return False
    out = Path(config.out or default_folder(kind)).absolute()
    claim(out, resume=config.resume)
    own = [argument for argument in sys.argv[1:] if not argument.startswith(("launcher", "out=", "resume="))]
    # the last word on it, whatever an experiment says: a job that submits another would never end
    own += [f"out={out}", "resume=true", "launcher.cluster=null"]
    if cluster == "slurm":
        number, path = _submit(Job(module, own), config, out)
    else:
        path = out / "jobs" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as output:
            command = [sys.executable, "-m", module, *own]
            number = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True).pid
    log.info("submitted job %s; it writes to %s, its output is in %s", number, out, path)
    return True


def _submit(job: Job, config: "RunConfig", out: Path) -> tuple[str, Path]:
    """Give a job to SLURM; its number, and where its output goes."""
    if importlib.util.find_spec("submitit") is None:
        raise UserError("launcher=slurm needs the package submitit: pip install '.[slurm]'")
    from submitit import AutoExecutor

    request = _request(config)
    executor = AutoExecutor(folder=out / "jobs", cluster="slurm", slurm_max_num_timeout=MOST_TURNS)
    executor.update_parameters(**request)
    submitted = executor.submit(job)
    return submitted.job_id, submitted.paths.stdout


def _request(config: "RunConfig") -> dict[str, Any]:
    """Arguments of submitit's executor."""
    settings, trainer = config.launcher, config.trainer
    tasks = trainer.get("devices", 1)
    if not isinstance(tasks, int) or tasks < 1:
        raise UserError(f"a job needs the number of processes per node: set trainer.devices=8, not {tasks}")
    gpus = settings.gpus_per_node
    if gpus is None:
        gpus = 0 if trainer.get("accelerator") == "cpu" else tasks
    names = ("partition", "account", "qos", "constraint")
    request = {
        "name": "dalle_pytorch",
        "timeout_min": settings.timeout_min,
        "nodes": trainer.get("num_nodes", 1),
        "tasks_per_node": tasks,
        "gpus_per_node": gpus,
        "cpus_per_task": settings.cpus_per_task,
        "mem_gb": settings.mem_gb,
        "slurm_setup": settings.setup,
        "slurm_signal_delay_s": settings.signal_delay_s,
        "slurm_additional_parameters": settings.additional,
        **{f"slurm_{name}": getattr(settings, name) for name in names},
    }
    return {name: value for name, value in request.items() if value is not None}
