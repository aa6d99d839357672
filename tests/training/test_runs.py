"""Runs as Hydra and Lightning users know them: folders, records, sweeps, objects of one's own."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.strategies.launchers.subprocess_script import _hydra_subprocess_cmd

import dalle_pytorch
from dalle_pytorch.commands import train_dalle, train_vae
from dalle_pytorch.config import CONFIGS
from dalle_pytorch.training.resume import prune
from dalle_pytorch.training.run import Run
from dalle_pytorch.training.vae import LitVAE

SMALL = [
    "model=tiny", "trainer=cpu", "data.batch_size=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "callbacks.picture_every=0", "logger=none",
]  # fmt: skip


def small(shards, out, *more):
    return [*SMALL, f"data.path={shards}", f"out={out}", *more]


def same(first, second):
    a, b = (dalle_pytorch.load(path).state_dict() for path in (first, second))
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


class Noted(Callback):
    """Where its settings and calls go."""

    seen: list = []  # noqa: RUF012

    def __init__(self, word):
        self.word = word

    def on_train_end(self, trainer, pl_module):
        self.seen.append(self.word)


def test_a_runs_own_settings_start_the_same_run(shards, tmp_path, run_command):
    """Its config.yaml alone, with further settings on top; of every option of model=, whose schema it remembers."""
    first = run_command(train_vae.main, *small(shards, tmp_path / "a run", "trainer.max_steps=2", "data.jitter=1"))
    again = run_command(train_vae.main, f"config={tmp_path}/a run/config.yaml", f"out={tmp_path / 'again'}")
    assert same(first, again)
    code, error = run_command(train_vae.main, f"config={tmp_path}/a run/config.yaml", "model.levels=[5,5]")
    assert code == 2
    assert "model.levels is no setting" in error
    sizes = ["model=fsq", "model.levels=[5,5]", "model.num_layers=2", "model.hidden_dim=8", "model.image_size=16"]
    run_command(train_vae.main, *small(shards, tmp_path / "fsq", *sizes, "trainer.max_steps=1"))
    more = [
        f"config={tmp_path}/fsq/config.yaml",
        f"out={tmp_path / 'b'}",
        "model.levels=[5,6]",
        "model.codebook_size=0",
    ]
    assert dalle_pytorch.load(run_command(train_vae.main, *more)).codebook_size == 30
    code, error = run_command(train_vae.main, f"config={tmp_path}/none.yaml")
    assert code == 1
    assert "none.yaml does not exist" in error


def test_a_run_records_what_it_was(shards, tmp_path, run_command):
    out = tmp_path / "run"
    run_command(train_vae.main, *small(shards, out, "trainer.max_steps=2", "logger=default", "seed=7"))
    record = json.loads((out / "run.json").read_text())
    assert record["command"][0] == "command.py"
    assert "seed=7" in record["overrides"] == OmegaConf.to_container(OmegaConf.load(out / ".hydra/overrides.yaml"))
    assert record["versions"]["torch"] == torch.__version__
    assert "parameters" in (out / "train_vae.log").read_text()
    assert "codebook_size: 32" in (out / "csv/version_0/hparams.yaml").read_text()
    with (out / "csv/version_0/metrics.csv").open() as file:
        columns = next(csv.reader(file))
    assert {"train/lr", "train/grad_norm", "train/samples_per_second", "train/tflops_per_second"} <= set(columns)


def test_a_points_error_ends_neither_the_sweep_nor_hides(shards, tmp_path, run_command):
    """Each point has its own folder and settings; scores are there; the exit code tells of the failure."""
    arguments = small(shards, tmp_path / "sweep", "trainer.max_steps=2")
    code, error = run_command(train_vae.main, "-m", *arguments, "data.batch_size=6,100,4")
    assert code == 1
    assert "data.batch_size is 100" in error
    with (tmp_path / "sweep/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["point"] for row in rows] == ["0", "2"]
    for row, size in zip(rows, (6, 4), strict=True):
        assert f"data.batch_size={size}" in row["overrides"]
        assert f"batch_size: {size}" in (tmp_path / "sweep" / row["point"] / "config.yaml").read_text()
        assert float(row["score"]) > 0


def test_out_may_name_each_point(shards, tmp_path, run_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = small(shards, "'points/${hydra:job.num}'", "trainer.max_steps=1")
    run_command(train_vae.main, "-m", *arguments, "seed=3,4")
    assert [f"seed: {seed}" in (tmp_path / f"points/{i}/config.yaml").read_text() for i, seed in enumerate((3, 4))]
    assert len(list((tmp_path / "runs/sweeps").glob("*/scores.csv"))) == 1


@pytest.mark.filterwarnings("ignore")  # the sweeper's Optuna 2 warns when it is imported
def test_a_sweeper_optimises_the_score(shards, tmp_path, run_command):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    arguments = small(shards, tmp_path / "sweep", "trainer.max_steps=2", "optim.lr=interval(1e-4,1e-2)")
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=maximize"]
    printed = run_command(train_vae.main, "-m", *arguments, *optuna, "hydra.sweeper.n_jobs=1")
    assert "Best value" in printed, printed
    with (tmp_path / "sweep/scores.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    assert len(scores) == 3
    assert OmegaConf.load(tmp_path / "sweep/optimization_results.yaml").best_value == pytest.approx(max(scores))


def test_other_processes_of_a_point_are_started_for_that_point(shards, tmp_path, run_command, monkeypatch):
    """Lightning starts them with this process's command line, which must not be the sweep's."""
    commands = []
    monkeypatch.setattr(Run, "fit", lambda *_: commands.append(_hydra_subprocess_cmd(local_rank=1)[0]))
    run_command(train_vae.main, "-m", *small(shards, tmp_path / "a sweep", "seed=3,4"))
    for number, (command, seed) in enumerate(zip(commands, (3, 4), strict=True)):
        assert f"seed={seed}" in command
        assert not {"--multirun", "seed=3,4"} & set(command)
        assert command.count("-m") <= 1  # python -m MODULE
        assert f'hydra.run.dir="{tmp_path}/a sweep/{number}"' in command


def test_every_run_of_a_sweep_is_a_wandb_run_of_its_own_and_offline_without_a_login(shards, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    arguments = small(shards, tmp_path / "sweep", "trainer.max_steps=1", "logger=wandb", "seed=0,1")
    done = subprocess.run(
        [sys.executable, "-m", "dalle_pytorch.commands.train_vae", "-m", *arguments],
        capture_output=True, text=True, check=False, env={**environment, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for point in "01":
        assert len(list((tmp_path / "sweep" / point / "wandb").glob("offline-run-*"))) == 1


def test_callbacks_loggers_and_optimisers_of_ones_own(shards, tmp_path, run_command, monkeypatch):
    monkeypatch.setitem(sys.modules, "noted_callback", sys.modules[__name__])
    mine = [
        "+callbacks.custom.mine={_target_: noted_callback.Noted, word: hello}",
        "+optim.custom={_target_: torch.optim.RMSprop, momentum: 0.5}",
        "+logger.mine={_target_: pytorch_lightning.loggers.CSVLogger, name: mine}",
    ]
    plain = run_command(train_vae.main, *small(shards, tmp_path / "plain", "trainer.max_steps=2"))
    other = run_command(train_vae.main, *small(shards, tmp_path / "mine", "trainer.max_steps=2", *mine))
    assert Noted.seen == ["hello"]
    assert not same(plain, other)
    assert list((tmp_path / "mine/mine").rglob("metrics.csv"))
    wrong = "+callbacks.custom.mine={_target_: noted_callback.Noted, words: hello}"
    code, error = run_command(train_vae.main, *small(shards, tmp_path / "wrong", "trainer.max_steps=2", wrong))
    assert code == 2
    assert "callbacks.custom.mine.words is not an argument of Noted: did you mean word?" in error


def test_a_defect_keeps_its_traceback(shards, tmp_path, run_command, monkeypatch):
    def broken(*_):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(LitVAE, "training_step", broken)
    with pytest.raises(ValueError, match="shapes do not fit") as error:
        run_command(train_vae.main, *small(shards, tmp_path / "run", "trainer.max_steps=2"))
    assert any(entry.name == "broken" for entry in error.traceback)


def test_checkpoints_are_those_that_were_asked_for(shards, tmp_path, run_command):
    """Where a step is the last of an epoch too (of 3), beside a validation or not; the last K, and some for good."""
    more = ["trainer.max_steps=14", "callbacks.checkpoint_every=3", "callbacks.keep_last=2", "callbacks.keep_every=6"]
    run_command(train_vae.main, *small(shards, tmp_path / "run", *more, "trainer.val_check_interval=4"))
    found = sorted(int(path.stem[5:]) for path in (tmp_path / "run/checkpoints").glob("step_*.ckpt"))
    assert found == [6, 9, 12, 14]  # 9 and 14 are the newest that are not kept for good
    assert dalle_pytorch.checkpoints.checkpoint.read_header(tmp_path / "run/vae.safetensors")["training"]["step"] <= 14


def test_the_last_steps_are_validated_and_saved_whatever_divides_what(shards, tmp_path, run_command):
    more = ["trainer.max_steps=7", "callbacks.checkpoint_every=1000", "trainer.val_check_interval=3", "logger=default"]
    run_command(train_vae.main, *small(shards, tmp_path / "run", *more))
    with (tmp_path / "run/csv/version_0/metrics.csv").open() as file:
        validated = [int(row["step"]) for row in csv.DictReader(file) if row["val/psnr"]]
    assert validated == [2, 5, 6]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000007.ckpt"]


def test_pruning_keeps_the_newest_and_those_for_good(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"step_{step:08d}.ckpt").touch()
    prune(tmp_path, 1, 4)
    assert sorted(int(path.stem[5:]) for path in tmp_path.iterdir()) == [4, 8, 10]


@pytest.mark.parametrize("limit", ["epochs", "time"])
def test_a_run_that_a_limit_ended_goes_on(shards, tmp_path, run_command, limit):
    limits = {
        "epochs": [["trainer.max_steps=-1", f"+trainer.max_epochs={count}"] for count in (2, 4)],
        "time": [["trainer.max_steps=100000", "+trainer.max_time=00:00:00:01"]] * 2,
    }
    arguments = small(shards, tmp_path / "run", "optim.schedule=constant", "resume=true")
    schedules = [f"{name}.shape=constant" for name in ("gumbel_tau", "kl_weight", "usage_weight")]
    steps = []
    for setting in limits[limit]:
        path = run_command(train_vae.main, *arguments, *schedules, *setting)
        steps.append(max(int(p.stem[5:]) for p in (tmp_path / "run/checkpoints").glob("step_*")))
        assert path.endswith("vae.safetensors")
    assert steps[1] > steps[0] > 0
    if limit == "epochs":
        assert steps == [6, 12]  # epochs of 3 steps


def test_micro_batches_change_no_step(shards, tmp_path, run_command):
    """The gradient of the mean over equal parts is that of the whole, up to the order of sums."""
    more = ["trainer.max_steps=1", "data.batch_size=6", "callbacks.keep=last", "callbacks.ema_decay=0", "model=fsq"]
    more += [
        "model.image_size=16",
        "model.num_layers=2",
        "model.hidden_dim=16",
        "optim.warmup_steps=0",
        "logger=default",
    ]
    norms, samples = [], []
    for size in (6, 3, 2, 1):
        out = tmp_path / str(size)
        run_command(train_vae.main, *small(shards, out, *more, f"data.micro_batch_size={size}"))
        with (out / "csv/version_0/metrics.csv").open() as file:
            norms.append(float(next(csv.DictReader(file))["train/grad_norm"]))
        state = torch.load(out / "checkpoints/step_00000001.ckpt", weights_only=True)["loops"]["fit_loop"]
        samples.append(state["epoch_loop.batch_progress"]["total"]["completed"] * size)
    assert samples == [6] * 4
    # a norm of some 10,000 gradients, each a sum over up to 6 x 256 pixels in fp32
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-4)


def test_micro_batches_of_captions_of_any_length_change_no_step(shards, vae_file, tmp_path, run_command):
    """The text loss is a mean over the caption tokens of the whole step; negative captions are those of the step."""
    more = [f"vae={vae_file}", "trainer.max_steps=1", "data.batch_size=6", "text.vocab_size=270", "logger=default"]
    more += ["model.contrast_weight=0.5", "model.loss_img_weight=0.1"]
    norms = []
    for size in (6, 2, 1):
        out = tmp_path / str(size)
        run_command(train_dalle.main, *small(shards, out, *more, f"data.micro_batch_size={size}"))
        with (out / "csv/version_0/metrics.csv").open() as file:
            norms.append(float(next(csv.DictReader(file))["train/grad_norm"]))
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_the_default_folder_is_refused_where_several_must_agree_on_it(shards, tmp_path, run_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [argument for argument in small(shards, "x", "trainer.max_steps=1") if not argument.startswith("out=")]
    elastic = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "1"}
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1"}
    for said, variables in (
        ("say which with out=", elastic),
        ("say which with out=", {**slurm, "SLURM_NTASKS_PER_NODE": "2"}),
        ("Use `--ntasks-per-node=2` instead", slurm),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            code, error = run_command(train_vae.main, *arguments)
            assert code == 1
            assert said in error
    code, error = run_command(train_vae.main, *arguments, "resume=true")
    assert code == 2
    assert "say which with out=" in error
    monkeypatch.setenv("SLURM_NTASKS", "4")  # an interactive shell's: this process is none of the four
    monkeypatch.setenv("SLURM_JOB_NAME", "shell")
    assert run_command(train_vae.main, *arguments).endswith("vae.safetensors")


def test_a_tilde_is_the_home_folder(shards, tmp_path, run_command, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(shards)
    arguments = small(shards, '"~/run"', "trainer.max_steps=1", 'data.path="~/data"')
    assert run_command(train_vae.main, *arguments) == str(tmp_path / "run/vae.safetensors")
    assert not (tmp_path / "~").exists()


def test_recipes_are_what_their_headers_say():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train_dalle", overrides=["experiment=paper_1b", "vae=x"])
    assert config.trainer.strategy.rank == 384


def test_tf32_is_a_setting(shards, tmp_path, run_command):
    before = torch.get_float32_matmul_precision()
    try:
        for wanted in ("highest", "high"):
            more = ["trainer.max_steps=1", f"matmul_precision={wanted}"]
            run_command(train_vae.main, *small(shards, tmp_path / wanted, *more))
            assert torch.get_float32_matmul_precision() == wanted
    finally:
        torch.set_float32_matmul_precision(before)


def test_other_data_of_the_same_size_are_told(shards, odd_shards, tmp_path, run_command):
    """As many training images, other ones."""
    arguments = small("DATA", tmp_path / "run", "optim.schedule=constant", "resume=true")
    schedules = [f"{name}.shape=constant" for name in ("gumbel_tau", "kl_weight", "usage_weight")]
    other = tmp_path / "other"
    other.mkdir()
    for path in odd_shards.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    index = json.loads((other / "index.json").read_text())
    for shard in index["shards"]:
        shard["sha256"] = "0" * 64
    (other / "index.json").write_text(json.dumps(index))
    for folder, steps in ((shards, 2), (shards, 3), (other, 4)):
        run_command(train_vae.main, *arguments, *schedules, f"data.path={folder}", f"trainer.max_steps={steps}")
        log = (tmp_path / "run/train_vae.log").read_text()
        assert log.count("other data than the run was trained on") == (folder == other)


def test_a_signal_to_the_whole_group_saves_and_stops(shards, tmp_path):
    """As timeout(1), scancel and a terminal's Ctrl-C send it: the workers that read data get it too."""
    arguments = small(shards, tmp_path / "run", "trainer.max_steps=100000", "data.num_workers=2", "logger=default")
    process = subprocess.Popen(
        [sys.executable, "-m", "dalle_pytorch.commands.train_vae", *arguments, "trainer.val_check_interval=1000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics, deadline = tmp_path / "run/csv/version_0/metrics.csv", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 4:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "stopped by SIGINT, saved" in output
    assert "Traceback" not in output
    assert len(list((tmp_path / "run/checkpoints").glob("step_*.ckpt"))) == 1


def test_settings_that_have_moved_are_refused_with_their_new_names(run_command):
    moved = {"bart.dim=3": "model.NAME=", "cluster.gpus=8": "hardware.NAME=", "network=dalle_bart": "model=NAME"}
    for setting, said in moved.items():
        code, error = run_command(train_dalle.main, "vae=x", setting)
        assert code == 2
        assert said in error
