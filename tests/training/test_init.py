"""Training on from a checkpoint's weights: what is taken from it, what may be set, what is refused."""

import re

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.commands import train_dalle
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.transformer import ForeignConfig
from dalle_pytorch.text import BPETokenizer

COMMON = [
    "trainer=cpu",
    "data.batch_size=4",
    "trainer.val_check_interval=1",
    "trainer.enable_progress_bar=false",
    "callbacks.ema_decay=0",
    "logger=none",
]


@pytest.fixture
def start(tmp_path, vae_file):
    """A checkpoint of a DALLE with options of its own, with or without a text tokenizer."""

    def make(*, tokenizer=True, **settings):
        text = BPETokenizer.train(["a red square", "a green square", "blue"] * 3, 262)
        sizes = {"dim": 24, "depth": 2, "heads": 2, "head_dim": 12, "text_len": 20, "text_vocab_size": 270}
        foreign = ForeignConfig(layer_scale=True, reversible=True, rotary="dalle_pytorch")
        options = {"foreign": foreign, "loss_img_weight": 3.0}
        config = DALLEConfig(**{**sizes, **options, **settings})
        dalle = dalle_pytorch.DALLE(config, vae=dalle_pytorch.load(vae_file))
        dalle.text_tokenizer = text if tokenizer else None
        dalle_pytorch.save(dalle, tmp_path / "start.safetensors", overwrite=True)
        return tmp_path / "start.safetensors"

    return make


def arguments(shards, out, init, *more, steps=1):
    return [*COMMON, f"data.path={shards}", f"out={out}", f"init={init}", f"trainer.max_steps={steps}", *more]


def test_weights_sizes_and_tokenizers_are_the_checkpoints(shards, start, tmp_path, run_command):
    """With next to no learning rate the result is what training began with; without init it would be noise."""
    path = start()
    printed = run_command(train_dalle.main, *arguments(shards, tmp_path / "run", path, "optim.lr=1e-20"))
    before, after = dalle_pytorch.load(path), dalle_pytorch.load(printed, kind="dalle")
    assert after.config == before.config
    assert after.text_tokenizer.state() == before.text_tokenizer.state()
    assert after.state_dict().keys() == before.state_dict().keys()
    for name, tensor in after.state_dict().items():
        torch.testing.assert_close(tensor, before.state_dict()[name], rtol=0, atol=1e-12)
    assert f"init: {path}" in (tmp_path / "run/config.yaml").read_text()


def test_it_learns_and_resumes(shards, start, tmp_path, run_command):
    path, out = start(), tmp_path / "run"
    first = dalle_pytorch.load(run_command(train_dalle.main, *arguments(shards, out, path, "optim.warmup_steps=0")))
    before = dict(dalle_pytorch.load(path).named_parameters())
    changed = [name for name, parameter in first.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.endswith("factor") for name in changed)
    more = arguments(shards, out, path, "optim.warmup_steps=0", "resume=true", steps=3)
    again = dalle_pytorch.load(run_command(train_dalle.main, *more))
    assert not torch.equal(again.image_head.weight, first.image_head.weight)


def test_settings_of_training_may_be_given(shards, start, tmp_path, run_command):
    """Those not given are the checkpoint's, whatever the default of the command."""
    path = start(token_dropout=0.05)
    more = [
        "model.caption_dropout=0.25",
        "model.gradient_scaling=true",
        "model.depth=2",
        "model.foreign.reversible=true",
    ]
    config = dalle_pytorch.load(run_command(train_dalle.main, *arguments(shards, tmp_path / "run", path, *more))).config
    assert (config.caption_dropout, config.gradient_scaling, config.token_dropout) == (0.25, True, 0.05)
    assert (config.dim, config.loss_img_weight) == (24, 3.0)


def test_wrong_captions_are_not_taken_over(shards, start, tmp_path, run_command):
    """They double the cost, and the phrases of the training before are not known."""
    path = start(contrast_weight=0.3, contrast_scale=2.0)
    printed = run_command(train_dalle.main, *arguments(shards, tmp_path / "run", path))
    config = dalle_pytorch.load(printed, kind="dalle").config
    assert (config.contrast_weight, config.contrast_scale) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.dim=32"], r"has model.dim=24, model.dim=32 contradicts it"),
        (["model=tiny"], r"has model.depth|has model.dim"),
        (["model.foreign.rotary=grid"], r"has model.foreign.rotary=dalle_pytorch, model.foreign.rotary=grid contra"),
        (["model.rotary=dalle_pytorch"], r"model.rotary is no setting any more; say model.foreign.rotary="),
        (["experiment=emoji_demo"], r"contradicts"),
        (["vae=some.safetensors"], r"brings its image tokenizer: leave vae=some.safetensors out"),
        (["text.tokenizer=clip"], r"brings its text tokenizer: leave text.tokenizer out"),
    ],
)
def test_contradictions_are_refused(shards, start, tmp_path, run_command, more, message):
    code, error = run_command(train_dalle.main, *arguments(shards, tmp_path / "run", start(), *more))
    assert code == 2
    assert re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_without_a_text_tokenizer_the_settings_must_name_one(shards, start, tmp_path, run_command):
    path = start(tokenizer=False)
    code, error = run_command(train_dalle.main, *arguments(shards, tmp_path / "run", path))
    assert code == 2
    assert "carries no text tokenizer" in error
    code, error = run_command(train_dalle.main, *arguments(shards, tmp_path / "run", path, "text.tokenizer=clip"))
    assert code == 2
    assert "knows 270 text ids" in error
    full = start()
    more = f"text.tokenizer_from={full.rename(full.with_name('other.safetensors'))}"
    path = start(tokenizer=False)
    printed = run_command(train_dalle.main, *arguments(shards, tmp_path / "run", path, more))
    assert dalle_pytorch.load(printed).text_tokenizer is not None


def test_a_plan_counts_the_checkpoints_model(start, monkeypatch, capsys):
    path = start()
    monkeypatch.setattr("sys.argv", ["train_dalle.py", "plan=true", f"init={path}"])
    train_dalle.main()
    count = sum(p.numel() for p in dalle_pytorch.load(path).parameters())
    assert f"parameters: {count:,} " in capsys.readouterr().out
