"""Two processes on a CPU train what one does: DDP, FSDP2, compressed gradients, gathered CLIP features."""

import csv
import json
import os
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import distributed

import dalle_pytorch
from dalle_pytorch.commands import train_vae
from dalle_pytorch.models.vq_vae import FSQConfig
from dalle_pytorch.training.strategies import SHARDED, PowerSGDStrategy, check_strategy
from dalle_pytorch.training.vae import make_vae

STEPS = 8
PHRASES = "contrast_phrases=[red,green,blue]"
TWO = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]


def settings(data, out, *more):
    return [
        f"data.path={data}", "model=tiny", "data.batch_size=4", f"out={out}", f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=4", "trainer.log_every_n_steps=2", "trainer.enable_progress_bar=false",
        "callbacks.ema_decay=0", "callbacks.picture_every=0", "callbacks.checkpoint_every=4", "callbacks.keep=last",
        *more,
    ]  # fmt: skip


mp.get_context("forkserver").set_forkserver_preload(
    [f"dalle_pytorch.commands.{name}" for name in ("train_vae", "train_dalle", "train_clip", "export", "generate")]
)
"""Imported once, in the process that all others of these tests are forked from."""


def run(rank, command, arguments, port, printed):
    """One of the processes of a command, started as the user's own launcher would."""
    torch.set_num_threads(1)
    if port is not None:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        rank_zero_only.rank = rank  # Lightning reads it when it is imported
    sys.argv = [command, *arguments, *(["hydra.output_subdir=null"] if rank else [])]
    with Path(printed).open("a") as file, redirect_stdout(file):
        import_module(f"dalle_pytorch.commands.{command}").main()
    if distributed.is_initialized():
        distributed.barrier()  # gloo aborts a process whose peer has gone
        distributed.destroy_process_group()


def train(command, *arguments):
    """Run a command in processes of its own; returns what it printed."""
    count = 2 if TWO[1] in arguments else 1
    with tempfile.NamedTemporaryFile("r") as printed:
        port = find_free_network_port() if count > 1 else None
        mp.start_processes(run, (command, arguments, port, printed.name), count, start_method="forkserver")
        return printed.read()


def losses(out, name="train/loss"):
    with (out / "csv/version_0/metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def dalle(vae_file):
    """With wrong captions: each picture's depends on the others of the batch, wherever they are."""
    contrast = ["model.contrast_weight=0.5", PHRASES]
    return [f"vae={vae_file}", "text.vocab_size=270", "model.caption_dropout=0", *contrast]


@pytest.fixture(scope="module")
def one(odd_shards, dalle, tmp_path_factory):
    """A DALLE trained by one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    train("train_dalle", *settings(odd_shards, out, *dalle, "trainer=cpu"))
    return out


def test_ddp_takes_the_same_steps(odd_shards, dalle, one, tmp_path):
    """Of a command that starts the second process itself."""
    arguments = settings(odd_shards, tmp_path / "run", *dalle, "trainer=ddp", *TWO)
    done = subprocess.run(
        [sys.executable, "-m", "dalle_pytorch.commands.train_dalle", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert losses(tmp_path / "run") == pytest.approx(losses(one), abs=1e-5)


def test_a_run_goes_on_with_another_number_of_processes(shards, dalle, tmp_path):
    """In the middle of an epoch. The same global batches: the losses are those of one process all along."""
    single, double = ["trainer=cpu"], ["trainer=ddp", *TWO]
    more = [*dalle, "optim.schedule=constant", "trainer.limit_val_batches=0"]
    train("train_dalle", *settings(shards, tmp_path / "whole", *more, *single))
    for begin, end in ((single, double), (double, single)):
        out = tmp_path / f"{begin[0]}_first".replace("=", "_")
        train("train_dalle", *settings(shards, out, *more, *begin, "trainer.max_steps=4"))
        train("train_dalle", *settings(shards, out, *more, *end, "resume=true"))
        assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_sharded_weights_take_the_same_steps_resume_and_become_one_file(odd_shards, dalle, one, tmp_path):
    out = tmp_path / "run"
    arguments = settings(odd_shards, out, *dalle, "trainer=fsdp", *TWO)
    train("train_dalle", *arguments)
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)
    a, b = (dalle_pytorch.load(path / "dalle.safetensors").state_dict() for path in (out, one))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)

    last = out / "checkpoints/step_00000008.ckpt"
    assert last.is_dir()
    (last / ".metadata").unlink()  # as a kill while checkpointing would leave it
    (out / "dalle.safetensors").unlink()
    assert "DAMAGED CHECKPOINT: step_00000008.ckpt is incomplete" in train("train_dalle", *arguments, "resume=true")
    assert losses(out) == pytest.approx(losses(one), abs=1e-5)

    file = tmp_path / "one_file.safetensors"
    train("export", f"weights={last}", f"out={file}")
    together = dalle_pytorch.load(file).state_dict()
    final = dalle_pytorch.load(out / "dalle.safetensors").state_dict()
    assert all(torch.equal(together[name], final[name]) for name in final)
    drawn = ['prompt="a red square"', "num_candidates=2", "num_keep=2", f"out={tmp_path}/drawn"]
    train("generate", f"weights={file}", *drawn)
    assert json.loads((tmp_path / "drawn/ranking.json").read_text())


def test_a_sharded_dalle_mini_takes_the_same_steps(odd_shards, vae_file, tmp_path):
    """With the keys of the caption recomputed in the backward pass as well."""
    mini = [
        "model=bart", "model.dim=32", "model.encoder_layers=1", "model.decoder_layers=2", "model.heads=2",
        "model.ffn_dim=40", "model.text_positions=30", "model.caption_dropout=0", "text.vocab_size=262",
        f"vae={vae_file}", "model.checkpoint_activations=true",
    ]  # fmt: skip
    for name, more in (("one", ["trainer=cpu"]), ("two", ["trainer=fsdp", *TWO])):
        arguments = [item for item in settings(odd_shards, tmp_path / name, *mini, *more) if item != "model=tiny"]
        train("train_dalle", *arguments, "trainer.max_steps=4")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    a, b = (dalle_pytorch.load(tmp_path / name / "dalle.safetensors").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_two_processes_learn_one_codebook(odd_shards, tmp_path):
    """Its moving averages are no parameters, so that averaged gradients do not reach them."""
    more = [
        "model=vq",
        *(f"model.{each}" for each in ("image_size=16", "num_layers=2", "hidden_dim=16", "num_resnet_blocks=1")),
    ]
    for name, processes in (("one", ["trainer=cpu"]), ("two", ["trainer=ddp", *TWO])):
        arguments = settings(odd_shards, tmp_path / name, *more, *processes)
        train("train_vae", *[item for item in arguments if item != "model=tiny"])
    a, b = (dalle_pytorch.load(tmp_path / name / "vae.safetensors").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_against_one_adversary(odd_shards, vgg_file, tmp_path, strategy):
    """That begins with the third step, its weight measured over both."""
    sizes = (f"model.{each}" for each in ("image_size=16", "num_layers=2", "hidden_dim=16", "num_resnet_blocks=1"))
    more = [
        "model=fsq", *sizes, "adversary.weight=0.5", "adversary.start=2", "adversary.r1=0.1", "adversary.r1_every=2",
        "adversary.discriminator.width=8", "adversary.discriminator.num_layers=1", "perceptual.weight=0.1",
        f"perceptual.network={vgg_file}",
    ]  # fmt: skip
    for name, processes in (("one", ["trainer=cpu"]), ("two", [f"trainer={strategy}", *TWO])):
        arguments = settings(odd_shards, tmp_path / name, *more, *processes)
        train("train_vae", *[item for item in arguments if item != "model=tiny"])
    for name in ("loss", "lpips", "discriminator", "adversary_weight", "discriminator_grad_norm"):
        a, b = (losses(tmp_path / run, f"train/{name}") for run in ("two", "one"))
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5), name
    a, b = (dalle_pytorch.load(tmp_path / name / "vae.safetensors").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_sharded_weights_learn_in_post_training(odd_shards, tmp_path):
    """All of the decoder, and nothing else."""
    torch.manual_seed(0)
    vae = make_vae(FSQConfig(image_size=16, num_layers=2, hidden_dim=16, num_resnet_blocks=1)).eval()
    dalle_pytorch.save(vae, tmp_path / "vae.safetensors")
    more = [f"init={tmp_path}/vae.safetensors", "perturbation.share=0.5", "trainer=fsdp", *TWO]
    arguments = settings(odd_shards, tmp_path / "run", *more)
    train("train_vae", *[item for item in arguments if item != "model=tiny"])
    for name, tensor in dalle_pytorch.load(tmp_path / "run/vae.safetensors").state_dict().items():
        assert torch.equal(tensor, vae.state_dict()[name]) != name.startswith("decoder."), name


def test_compressed_gradients_stay_near(odd_shards, dalle, one, tmp_path):
    """Of rank 8 where the widest matrices have 32: another path, not another training."""
    power = ["trainer=powersgd", "trainer.strategy.rank=8", "trainer.strategy.start_step=2"]
    train("train_dalle", *settings(odd_shards, tmp_path / "run", *dalle, *power, *TWO))
    differences = [abs(a - b) for a, b in zip(losses(tmp_path / "run"), losses(one), strict=True)]
    assert differences[0] < 1e-5  # averaged as they are at first
    assert 1e-7 < max(differences) < 0.01


def test_clip_contrasts_the_pairs_of_all_processes(shards, tmp_path):
    """And the captions with other phrases."""
    for name, more in (("one", ["trainer=cpu"]), ("two", ["trainer=ddp", *TWO])):
        train("train_clip", *settings(shards, tmp_path / name, "text.vocab_size=270", PHRASES, *more))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    a, b = (dalle_pytorch.load(tmp_path / name / "clip.safetensors").state_dict() for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_what_cannot_run_is_refused_in_words(shards, tmp_path, run_command):
    code, error = run_command(
        train_vae.main, *settings(shards, tmp_path / "a", "trainer=fsdp", *TWO, "callbacks.ema_decay=0.9")
    )
    assert code == 1
    assert "callbacks.ema_decay=0" in error
    for strategy in ("fsdp", "deepspeed_stage_2"):
        with pytest.raises(ValueError, match=r"trainer=fsdp \(FSDP2\)"):
            check_strategy({"strategy": strategy}, None, "adamw")
    sharded = {"strategy": {"_target_": SHARDED}}
    with pytest.raises(ValueError, match="optim=adamw8bit does not go with trainer=fsdp"):
        check_strategy(sharded, None, "adamw8bit")
    with pytest.raises(ValueError, match="shared_attn_ids does not go with"):
        check_strategy(sharded, dalle_pytorch.DALLEConfig(shared_attn_ids=[0]), "adamw")
    with pytest.raises(ValueError, match="start_step >= 2"):
        PowerSGDStrategy(start_step=1)
