"""launcher=slurm, against commands that behave like SLURM's: two processes, a signal, another turn."""

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
from dalle_pytorch.training.launch import LauncherConfig

JOB = str(40_000 + os.getpid() % 10_000)  # Lightning's port is 15,000 + its last four digits
COMMON = f"""#!{sys.executable}
import os, subprocess, sys
state = {{state!r}}
def start(script, turn):  # as slurmctld does, in the background
    with open(f"{{state}}/turns", "a") as file:
        file.write("turn ")
    names = {{{{"SLURM_JOB_ID": "{JOB}", "SLURM_JOBID": "{JOB}", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "dalle_pytorch",
        "SLURM_RESTART_COUNT": str(turn)}}}}
    with open(f"{{state}}/output", "a") as output:
        subprocess.Popen(["bash", script], env={{{{**os.environ, **names}}}}, stdout=output, stderr=output,
            start_new_session=True)
"""
COMMANDS = {
    "sbatch": """
script = sys.argv[-1]
open(f"{state}/script", "w").write(script)
print("Submitted batch job JOB")
start(script, 0)
""",
    "srun": """
arguments = sys.argv[1:]
while arguments and arguments[0].startswith("-"):
    option = arguments.pop(0)
    if option in ("--output", "--error"):
        arguments.pop(0)
tasks = [subprocess.Popen(arguments, env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
    for i in range(2)]
open(f"{state}/pids", "w").write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
if os.path.exists(f"{state}/requeue"):
    os.remove(f"{state}/requeue")
    start(open(f"{state}/script").read(), 1)
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
        (folder / name).write_text(COMMON.format(state=str(state)) + body.replace("JOB", JOB))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
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


def wait_for(condition, state):
    deadline = time.monotonic() + 180  # a loaded machine starts a process in half a minute
    while not condition():
        assert time.monotonic() < deadline, "\n".join(path.read_text()[-3000:] for path in state.glob("*"))
        time.sleep(0.01)


def steps(out):
    path = out / "csv/version_0/metrics.csv"
    return path.read_text().count("\n") if path.exists() else 0


def test_a_job_saves_asks_for_another_turn_and_ends_as_if_it_had_not_stopped(shards, slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command, out = [sys.executable, "-m", "dalle_pytorch.commands.train_vae"], tmp_path / "job"
    done = subprocess.run(
        [*command, *settings(shards, out, "launcher=slurm")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"submitted job {JOB}" in done.stdout
    wait_for(lambda: steps(out) > 8, slurm)
    for pid in (slurm / "pids").read_text().split():  # what SLURM does two minutes before the end
        os.kill(int(pid), signal.SIGUSR2)
    wait_for((out / "vae.safetensors").exists, slurm)
    wait_for(lambda: (slurm / "codes").exists() and (slurm / "codes").read_text().count("\n") == 2, slurm)
    assert (slurm / "turns").read_text().count("turn") == 2
    assert "[0, 0]" in (slurm / "codes").read_text()
    whole = subprocess.run(
        [*command, *settings(shards, tmp_path / "whole")], capture_output=True, text=True, check=False
    )
    assert whole.returncode == 0, whole.stderr
    a, b = (dalle_pytorch.load(path / "vae.safetensors").state_dict() for path in (out, tmp_path / "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_launching_refuses_what_cannot_run(shards, slurm, tmp_path, run_command):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    code, error = run_command(train_vae.main, *settings(shards, tmp_path / "mine", "launcher=slurm"))
    assert code == 1
    assert "resume=true" in error
    code, error = run_command(
        train_vae.main, *settings(shards, tmp_path / "none", "launcher=slurm", "trainer.devices=-1")
    )
    assert code == 1
    assert "trainer.devices=8" in error
    assert not (slurm / "turns").exists()
    with pytest.raises(ValueError, match=r"launcher\.cluster must be one of slurm, local or null, got 'pbs'"):
        LauncherConfig(cluster="pbs")


def test_a_background_process_of_this_machine(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "job"
    arguments = settings(shards, out, "launcher=local", "trainer=cpu", "trainer.devices=1", "trainer.max_steps=4")
    done = subprocess.run(
        [sys.executable, "-m", "dalle_pytorch.commands.train_vae", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "submitted job" in done.stdout
    jobs = out / "jobs"
    wait_for(lambda: any("vae.safetensors" in log.read_text() for log in jobs.glob("*.log")), jobs)
    assert (out / "vae.safetensors").exists()
