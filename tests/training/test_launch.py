"""launcher=slurm, against commands that behave like SLURM's: processes, arrays, a signal, another turn."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.commands import train_vae

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

JOB = 40_000 + os.getpid() % 10_000  # Lightning's port is 15,000 + its last four digits
COMMON = f"""#!{sys.executable}
import os, re, subprocess, sys
state = {{state!r}}
def start(script, turn, task):  # as slurmctld does, in the background
    with open(f"{{state}}/turns", "a") as file:
        file.write(f"{{{{task}}}} ")
    text = open(script).read()
    tasks = re.search(r"--ntasks-per-node=(\\d+)", text)[1]
    job = str({JOB} + int(task or 0))
    names = {{{{"SLURM_JOB_ID": job, "SLURM_JOBID": job, "SLURM_NTASKS": tasks, "SLURM_NTASKS_PER_NODE": tasks,
        "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "dalle_pytorch",
        "SLURM_RESTART_COUNT": str(turn)}}}}
    if task is not None:
        names |= {{{{"SLURM_ARRAY_JOB_ID": "{JOB}", "SLURM_ARRAY_TASK_ID": task}}}}
    with open(f"{{state}}/output", "a") as output:
        subprocess.Popen(["bash", script], env={{{{**os.environ, **names}}}}, stdout=output, stderr=output,
            start_new_session=True)
"""
COMMANDS = {
    "sbatch": """
script = sys.argv[-1]
open(f"{state}/script", "w").write(open(script).read())
print("Submitted batch job JOB")
array = re.search(r"--array=0-(\\d+)", open(script).read())
for task in [None] if array is None else map(str, range(int(array[1]) + 1)):
    start(f"{state}/script", 0, task)
""",
    "srun": """
arguments = sys.argv[1:]
while arguments and arguments[0].startswith("-"):
    option = arguments.pop(0)
    if option in ("--output", "--error"):
        arguments.pop(0)
task = os.environ.get("SLURM_ARRAY_TASK_ID")
tasks = [subprocess.Popen(arguments, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(int(os.environ["SLURM_NTASKS"]))]
open(f"{state}/pids", "a").write(" ".join(str(task.pid) for task in tasks) + " ")
codes = [task.wait() for task in tasks]
if os.path.exists(f"{state}/requeue"):
    os.remove(f"{state}/requeue")
    start(f"{state}/script", 1, task)
open(f"{state}/codes", "a").write(f"{codes}\\n")
""",
    "scontrol": """
assert sys.argv[1:] == ["requeue", "JOB"], sys.argv
open(f"{state}/requeue", "w").close()
""",
    "sacct": 'print("JobID|State")\n',
    "scancel": "",
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A folder of commands on PATH; what they do is recorded in the folder given."""
    folder, state = tmp_path / "bin", tmp_path / "state"
    folder.mkdir()
    state.mkdir()
    for name, body in COMMANDS.items():
        (folder / name).write_text(COMMON.format(state=str(state)) + body.replace("JOB", str(JOB)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield state
    for pid in (state / "pids").read_text().split() if (state / "pids").exists() else ():
        with contextlib.suppress(ProcessLookupError):  # it has ended, unless the test failed
            os.kill(int(pid), signal.SIGKILL)


def settings(shards, out, *more):
    return [
        f"data.path={shards}", "model=tiny", "data.batch_size=4", f"out={out}", "trainer.max_steps=40",
        "trainer.val_check_interval=20", "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
        "callbacks.picture_every=0", "callbacks.checkpoint_every=1000", "callbacks.keep=last", "trainer=ddp",
        "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true", *more,
    ]  # fmt: skip


def wait_for(condition, process, state):
    deadline = time.monotonic() + 180  # a loaded machine starts a process in half a minute
    while not condition():
        logs = "\n".join(path.read_text()[-3000:] for path in state.glob("*"))
        assert process.poll() is None, process.stdout.read() + logs
        assert time.monotonic() < deadline, logs
        time.sleep(0.01)


def steps(out):
    path = out / "csv/version_0/metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_job_saves_is_requeued_and_ends_as_if_it_had_not_stopped(shards, slurm, tmp_path):
    command, out = [sys.executable, "-m", "dalle_pytorch.commands.train_vae"], tmp_path / "a job"
    arguments = settings(shards, f"'{out}'", "launcher=slurm")
    job = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: steps(out) > 8, job, slurm)
    for pid in (slurm / "pids").read_text().split():  # what SLURM does two minutes before the end
        os.kill(int(pid), signal.SIGUSR2)
    printed, _ = job.communicate(timeout=180)
    assert job.returncode == 0, printed
    assert (slurm / "turns").read_text() == "None None "
    assert not list((out / "checkpoints").glob(".*"))
    whole = subprocess.run(
        [*command, *settings(shards, tmp_path / "whole")], capture_output=True, text=True, check=False
    )
    assert whole.returncode == 0, whole.stderr
    a, b = (dalle_pytorch.load(path / "vae.safetensors").state_dict() for path in (out, tmp_path / "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_sweep_is_an_array_whose_points_are_trained_once_each(shards, slurm, tmp_path):
    """One fails; its scores are in the sweep's folder all the same."""
    out = tmp_path / "sweep"
    arguments = settings(shards, out, "launcher=slurm", "trainer=cpu", "trainer.devices=1", "trainer.max_steps=2")
    done = subprocess.run(
        [sys.executable, "-m", "dalle_pytorch.commands.train_vae", "-m", *arguments, "data.batch_size=4,100,6"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "data.batch_size is 100" in done.stderr
    assert sorted((slurm / "turns").read_text().split()) == ["0", "1", "2"]
    rows = (out / "scores.csv").read_text().splitlines()
    assert rows[0] == "point,score,overrides"
    assert sorted(row.partition(",")[0] for row in rows[1:]) == ["0", "2"]
    sizes = {point: (out / point / "config.yaml").read_text() for point in "02"}
    assert "batch_size: 4" in sizes["0"]
    assert "batch_size: 6" in sizes["2"]


def test_launching_refuses_what_cannot_run(shards, slurm, tmp_path, run_command):
    code, error = run_command(
        train_vae.main, *settings(shards, tmp_path / "none", "launcher=slurm", "trainer.devices=-1")
    )
    assert code != 0
    assert "trainer.devices=8" in error
    assert not (slurm / "turns").exists()


def test_points_run_beside_each_other_on_this_machine(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = settings(
        shards, f"'{tmp_path}/${{hydra:job.num}}'", "launcher=local", "trainer=cpu", "trainer.max_steps=2"
    )
    done = subprocess.run(
        [sys.executable, "-m", "dalle_pytorch.commands.train_vae", "-m", *arguments, "trainer.devices=1", "seed=3,4"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for point, seed in (("0", 3), ("1", 4)):
        assert (tmp_path / point / "vae.safetensors").is_file()
        assert f"seed: {seed}" in (tmp_path / point / "config.yaml").read_text()
