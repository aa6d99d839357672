"""Clipping, steps left out, scales in the logs, and the options that a step can be run with."""

import csv
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import dalle_pytorch
from dalle_pytorch.commands import train_dalle
from dalle_pytorch.errors import UserError
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.training.stability import MOST_SKIPPED, SkippedSteps, clip_gradients


def test_clipping_scales_to_the_norm_and_tells_what_it_was():
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([2.0, 4.0]), torch.tensor([4.0])
    assert clip_gradients(weights, 0.0) == pytest.approx(6)
    assert weights[0].grad.tolist() == [2, 4]
    assert clip_gradients(weights, 3.0) == pytest.approx(6)
    torch.testing.assert_close(weights[0].grad, torch.tensor([1.0, 2.0]))
    weights[0].grad[0] = math.inf
    assert not math.isfinite(clip_gradients(weights, 3.0))


def test_skipped_steps_are_named_and_too_many_in_a_row_are_fatal(caplog):
    net, skipped = nn.Linear(2, 2), SkippedSteps()
    net.weight.grad, net.bias.grad = torch.full((2, 2), math.nan), torch.zeros(2)
    skipped.note(False, net, 7)
    assert "step 7 left out: gradients are not finite in weight (1 steps so far)" in caplog.text
    skipped.note(True, net, 8)
    for step in range(MOST_SKIPPED - 1):
        skipped.note(False, net, step)
    assert skipped.total == MOST_SKIPPED
    with pytest.raises(
        UserError,
        match=r"20 steps in a row.*weight.*lower optim\.lr, or set optim\.clip=1, trainer\.precision=bf16-mixed$",
    ):
        skipped.note(False, net, 99)


def test_the_advice_fits_the_network(tiny_vae, make_dalle):
    for net, has in ((make_dalle(), True), (tiny_vae, False)):
        skipped = SkippedSteps()
        for step in range(MOST_SKIPPED - 1):
            skipped.note(False, net, step)
        with pytest.raises(UserError) as stop:
            skipped.note(False, net, 99)
        assert ("model.qk_norm=true, model.z_loss=1e-4" in str(stop.value)) == has
    config = DALLEBartConfig(
        dim=8, encoder_layers=1, decoder_layers=1, heads=1, ffn_dim=8, grid_size=4, text_vocab_size=9, text_positions=4
    )
    net, skipped = DALLEBart(config, tiny_vae), SkippedSteps()
    for step in range(MOST_SKIPPED - 1):
        skipped.note(False, net, step)
    with pytest.raises(UserError, match=r"lower optim\.lr, or set optim\.clip=1, trainer\.precision=bf16-mixed$"):
        skipped.note(False, net, 99)


SMALL = [
    "model=tiny", "trainer=cpu", "data.batch_size=4", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "callbacks.picture_every=0", "callbacks.ema_decay=0", "callbacks.keep=last",
    "text.vocab_size=270",
]  # fmt: skip


@pytest.fixture
def train(shards, vae_file, tmp_path, run_command):
    """Train a tiny DALLE; returns the rows that it logged."""

    def run(name, *arguments):
        out = tmp_path / name
        printed = run_command(
            train_dalle.main, *SMALL, f"data.path={shards}", f"vae={vae_file}", f"out={out}", *arguments
        )
        assert printed == str(out / "dalle.safetensors"), printed
        with (out / "csv/version_0/metrics.csv").open() as file:
            return [row for row in csv.DictReader(file) if row.get("train/loss")]

    return run


def test_a_step_that_is_not_finite_changes_nothing(train, monkeypatch, tmp_path):
    """The second of three steps has an infinite gradient; the run ends as one of the other two would."""
    original = train_dalle.LitDALLE.training_step

    def broken(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        return loss * math.inf if self.global_step == 1 else loss

    weights = {}
    take = train_dalle.LitDALLE.on_train_batch_start

    def remember(self, batch, batch_idx):
        weights[self.global_step] = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        return take(self, batch, batch_idx)

    monkeypatch.setattr(train_dalle.LitDALLE, "training_step", broken)
    monkeypatch.setattr(train_dalle.LitDALLE, "on_train_batch_start", remember)
    rows = train("run", "trainer.max_steps=3")
    assert [float(row["train/skipped_steps"]) for row in rows] == [0, 1, 1]
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[1])
    assert not all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_norms_and_activation_scales_are_logged(train):
    rows = train("run", "trainer.max_steps=2", "callbacks.activation_scales=true")
    assert all(float(row["train/grad_norm"]) > 0 for row in rows)
    assert all(float(row[f"scale/block_0{layer}"]) > 0 for row in rows for layer in (0, 1))


@pytest.mark.parametrize(
    "option",
    [["model.checkpoint_activations=true"], ["data.micro_batch_size=2"]],
)
def test_options_that_change_no_training(train, tmp_path, option):
    """Recomputed blocks, or a step in two halves, end with the same weights."""
    # the image loss alone is a mean over equal halves; text loss has another divisor in each
    settings = ["trainer.max_steps=4", "model.caption_dropout=0", "model.loss_img_weight=1e9"]
    train("plain", *settings)
    train("other", *settings, *option)
    plain, other = (
        dalle_pytorch.load(tmp_path / name / "dalle.safetensors").state_dict() for name in ("plain", "other")
    )
    assert all(torch.allclose(plain[name], other[name], atol=1e-5) for name in plain)


@pytest.mark.parametrize("option", [["optim=muon"], ["optim=adamw8bit"], ["model.z_loss=1e-3"], ["model.gated=false"]])
def test_every_optimiser_and_option_trains(train, option):
    rows = train("run", "trainer.max_steps=3", *option)
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)


def test_float16_with_a_gradient_scale_for_every_block(train, tmp_path):
    rows = train("run", "trainer.max_steps=3", "trainer.precision=16-mixed", "model.gradient_scaling=true")
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)
    dalle = dalle_pytorch.load(tmp_path / "run/dalle.safetensors")
    scales = [module.exponent.item() for name, module in dalle.named_modules() if name.endswith("_scale")]
    assert len(scales) == 4
    assert all(scale != 13_000 for scale in scales)  # moved in every step


def test_compiled_blocks_train_alike(train, shards, vae_file, tmp_path):
    """In a process without pytest's shape checks, which torch.compile cannot read."""
    settings = ["trainer.max_steps=2", "model.caption_dropout=0", "model.depth=1"]
    plain, out = train("plain", *settings), tmp_path / "compiled"
    command = [sys.executable, "-m", "dalle_pytorch.commands.train_dalle", *SMALL, f"data.path={shards}"]
    done = subprocess.run(
        [*command, f"vae={vae_file}", f"out={out}", *settings, "compile=true"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "recompile_limit" not in done.stderr
    with (out / "csv/version_0/metrics.csv").open() as file:
        compiled = [row for row in csv.DictReader(file) if row.get("train/loss")]
    losses = [[float(row["train/loss"]) for row in rows] for rows in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
