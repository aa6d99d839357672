"""A run that is killed and started again ends as one that was not, bit for bit."""

import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.commands import train_dalle
from dalle_pytorch.training.dalle import LitDALLE
from dalle_pytorch.training.resume import checkpoint_error, find_last

STEPS = 24
PHRASES = "contrast_phrases=[red,green,blue]"


def command(data, vae, out, *more):
    """train_dalle.py with every source of randomness on, epochs of 3 batches, a checkpoint after every 4 steps."""
    return [
        sys.executable, "-m", "dalle_pytorch.commands.train_dalle", f"data.path={data}", f"vae={vae}", f"out={out}",
        "model=tiny", "trainer=cpu", "data.batch_size=4", f"trainer.max_steps={STEPS}", "trainer.val_check_interval=6",
        "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "callbacks.picture_every=0",
        "callbacks.checkpoint_every=4", "callbacks.keep=last", "text.vocab_size=270", "text.bpe_dropout=0.3",
        "model.caption_dropout=0.3", "model.token_dropout=0.3", "model.ff_dropout=0.2", "data.token_crops=0",
        "data.jitter=2", "data.caption_weights=[1,2]", "model.contrast_weight=0.5", PHRASES, "resume=true", *more,
    ]  # fmt: skip


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(arguments):
    """The command in this process, which need not import everything again."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["train_dalle.py", *arguments[3:]])
        try:
            train_dalle.main()
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(arguments, code, output.getvalue(), errors.getvalue())


def start_and_wait_for(arguments, ready):
    """Start a command and return it when something has happened."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    )
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def logged(out):
    """What the run logged, by step; not the speed."""
    with (out / "csv/version_0/metrics.csv").open() as file:
        rows = [
            {
                k: v
                for k, v in row.items()
                if v and k not in ("train/samples_per_second", "train/tflops_per_second", "epoch")
            }
            for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda row: (int(row["step"]), sorted(row)))


def steps_logged(out):
    return {int(row["step"]) for row in logged(out)} if (out / "csv/version_0/metrics.csv").exists() else set()


def same_weights(out, other):
    a, b = (dalle_pytorch.load(path / "dalle.safetensors").state_dict() for path in (out, other))
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(shards, vae_file, tmp_path_factory):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(shards, vae_file, out))
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in logged(out) if "train/loss" in row] == [str(step) for step in range(STEPS)]
    return out


class Crash(Exception):
    """Ends a run at once, as a kill does: nothing is saved."""


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_a_crash_in_the_middle_of_an_accumulation(shards, vae_file, tmp_path, run_command, monkeypatch, parts):
    """Checkpoints and validations are due every 3 steps, at the end of an epoch or in it, and the last step is none."""
    size = 6 if parts == 3 else 4
    settings = [argument for argument in command(shards, vae_file, "OUT")[3:] if "trainer.max_steps" not in argument]
    settings += [f"data.batch_size={size}", f"data.micro_batch_size={size // parts}", "trainer.max_steps=10"]
    settings += ["trainer.val_check_interval=3", "callbacks.checkpoint_every=3"]
    whole = run_command(train_dalle.main, *settings, f"out={tmp_path / 'whole'}")
    assert whole.endswith("dalle.safetensors")
    batches = LitDALLE.on_train_batch_start

    def crash(self, batch, batch_idx):
        if self.trainer.fit_loop.total_batch_idx + 1 == 7 * parts + parts // 2:
            raise Crash
        batches(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitDALLE, "on_train_batch_start", crash)
        with pytest.raises(Crash):
            run_command(train_dalle.main, *settings, f"out={tmp_path / 'run'}")
    assert find_last(tmp_path / "run/checkpoints").name == "step_00000006.ckpt"
    run_command(train_dalle.main, *settings, f"out={tmp_path / 'run'}")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert {int(row["step"]) for row in logged(tmp_path / "run") if "val/loss" in row} == {2, 5, 8, 9}
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_sigkill_in_the_middle_of_an_epoch(shards, vae_file, whole, tmp_path):
    """And again after the resumption: nothing but resume=true is needed, not even for the first start."""
    out = tmp_path / "run"
    arguments = command(shards, vae_file, out)
    for step in (5, 16):  # the last checkpoints are those after 4 and 16
        process = start_and_wait_for(arguments, lambda step=step: step in steps_logged(out))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (out / "dalle.safetensors").exists()
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert logged(out) == logged(whole)
    assert same_weights(out, whole)
    again = run(arguments)
    assert "is finished: 24 steps" in again.stdout
    assert same_weights(out, whole)


def test_the_best_is_the_best_of_the_whole_run(shards, vae_file, tmp_path):
    """Validations and checkpoints at the same steps, and validation growing worse: the first is the best."""
    more = ["callbacks.keep=best", "callbacks.checkpoint_every=6", "optim.lr=0.03", "callbacks.ema_decay=0"]
    for out in (tmp_path / "whole", tmp_path / "run"):
        arguments = command(shards, vae_file, out, *more)
        if out.name == "run":
            process = start_and_wait_for(arguments, lambda: 7 in steps_logged(tmp_path / "run"))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        done = run(arguments)
        assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_result_that_a_kill_prevented_is_written_from_the_last_checkpoint(whole, shards, vae_file, tmp_path):
    """With averaged weights, as a run that ends has them."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "dalle.safetensors").unlink()
    done = run(command(shards, vae_file, out))
    assert done.returncode == 0, done.stderr
    assert same_weights(out, whole)
    for path in (out / "checkpoints").glob("step_*"):
        path.unlink()
    done = run(command(shards, vae_file, out))  # a result, and nothing that says whose
    assert done.returncode == 1
    assert "nothing is overwritten" in done.stderr


def test_sigterm_saves_the_step_it_is_in(shards, vae_file, whole, tmp_path):
    out = tmp_path / "run"
    arguments = command(shards, vae_file, out, "callbacks.checkpoint_every=1000")
    process = start_and_wait_for(arguments, lambda: 4 in steps_logged(out))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM, saved" in output
    (saved,) = (out / "checkpoints").glob("step_*.ckpt")
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    # a validation that was due at that very step is left out: there might not be time for it
    left_out = str(int(saved.stem.removeprefix("step_")) - 1)
    rows = [row for row in logged(whole) if not (row["step"] == left_out and "val/loss" in row)]
    assert [row for row in logged(out) if not (row["step"] == left_out and "val/loss" in row)] == rows
    assert same_weights(out, whole)


def test_a_kill_while_checkpointing_leaves_the_one_before(shards, vae_file, whole, tmp_path):
    out = tmp_path / "run"
    arguments = command(shards, vae_file, out)
    slow = """
import os, sys, time
from dalle_pytorch import files
replace = os.replace
def wait(source, target):
    if "step_00000008" in str(target):
        time.sleep(60)  # written, not yet in its place
    replace(source, target)
files.os.replace = wait
sys.argv = ["train_dalle.py", *sys.argv[1:]]
from dalle_pytorch.commands.train_dalle import main
main()
"""
    process = start_and_wait_for(
        [sys.executable, "-c", slow, *arguments[3:]], lambda: list(out.glob("checkpoints/.step_00000008.ckpt.*.tmp"))
    )
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert find_last(out / "checkpoints").name == "step_00000004.ckpt"
    done = run(arguments)
    assert done.returncode == 0, done.stderr
    assert not list((out / "checkpoints").glob(".*"))
    assert logged(out) == logged(whole)
    assert same_weights(out, whole)


def test_a_truncated_checkpoint_is_passed_over_loudly(shards, vae_file, whole, tmp_path):
    out = tmp_path / "run"
    done = run(command(shards, vae_file, out, "trainer.max_steps=8", "optim.schedule=constant"))
    assert done.returncode == 0, done.stderr
    (out / "dalle.safetensors").unlink()
    newest = out / "checkpoints/step_00000008.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    done = run(command(shards, vae_file, out, "trainer.max_steps=8", "optim.schedule=constant"))
    assert done.returncode == 0, done.stderr
    assert "DAMAGED CHECKPOINT: step_00000008.ckpt is truncated" in done.stdout
    assert "going on from step 4" in done.stdout
    assert (out / "dalle.safetensors").exists()


def test_damage_is_seen_by_checksum(tmp_path):
    torch.save({"weights": torch.rand(1000)}, tmp_path / "step_00000002.ckpt")
    torch.save({"weights": torch.rand(1000)}, tmp_path / "step_00000001.ckpt")
    assert checkpoint_error(tmp_path / "step_00000002.ckpt") is None
    content = bytearray((tmp_path / "step_00000002.ckpt").read_bytes())
    content[len(content) // 2] ^= 1  # one bit of the weights
    (tmp_path / "step_00000002.ckpt").write_bytes(content)
    assert "another checksum" in checkpoint_error(tmp_path / "step_00000002.ckpt")
    assert find_last(tmp_path).name == "step_00000001.ckpt"
    (tmp_path / "step_00000001.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint.*is whole.*another out="):
        find_last(tmp_path)
    assert find_last(tmp_path / "none") is None


def test_changed_settings_are_told(shards, vae_file, tmp_path):
    out = tmp_path / "run"
    run(command(shards, vae_file, out, "trainer.max_steps=4"))
    done = run(command(shards, vae_file, out, "trainer.max_steps=6", "optim.lr=0.5"))
    assert "resumed with other settings: optim.lr was 0.001, is 0.5; trainer.max_steps was 4, is 6" in done.stdout


def test_a_changed_learning_rate_is_the_one_that_counts(shards, vae_file, tmp_path):
    weights = []
    for steps, rate in ((4, 1e-3), (6, 1e-30), (8, 1e-3)):
        more = f"trainer.max_steps={steps}", f"optim.lr={rate}", "callbacks.ema_decay=0"
        done = run(command(shards, vae_file, tmp_path / "run", *more))
        assert done.returncode == 0, done.stderr
        weights.append(dalle_pytorch.load(tmp_path / "run/dalle.safetensors").transformer.state_dict())
    for name, first in weights[0].items():
        assert torch.equal(first, weights[1][name])
    assert any(not torch.equal(first, weights[2][name]) for name, first in weights[1].items())
