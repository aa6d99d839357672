"""The three trainings end to end through their commands."""

import math
import subprocess
import sys

import pytest
import torch
from PIL import Image

import dalle_pytorch
from dalle_pytorch import DALLEConfig
from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.commands import train_clip, train_dalle, train_vae
from dalle_pytorch.errors import ConfigError
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.training.base import tile
from dalle_pytorch.training.dalle import TrainDALLEConfig, check_codes, sampled_codes
from dalle_pytorch.training.plan import Sizes
from dalle_pytorch.training.vae import count_codes, perplexity

SMALL = [
    "model=tiny",
    "trainer=cpu",
    "data.batch_size=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "callbacks.picture_every=2",
    "callbacks.checkpoint_every=2",
    "logger=none",
]


def small(shards, out, steps=4, *more):
    return [*SMALL, f"data.path={shards}", f"out={out}", f"trainer.max_steps={steps}", *more]


def test_train_vae(shards, tmp_path, run_command):
    out = tmp_path / "run"
    printed = run_command(train_vae.main, *small(shards, out, 4, "logger=default"))
    assert printed == str(out / "vae.safetensors")
    vae = dalle_pytorch.load(printed)
    assert vae.decode(vae.encode(torch.rand(2, 3, 16, 16))).shape == (2, 3, 16, 16)
    assert [p.name for p in sorted((out / "pictures").iterdir())] == ["step_000002.png", "step_000004.png"]
    with Image.open(out / "pictures/step_000004.png") as picture:
        assert picture.mode == "RGB"
    header = (out / "csv/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    wanted = {"train/loss", "train/kl", "train/gumbel_tau", "train/samples_per_second", "val/psnr", "val/perplexity"}
    assert wanted <= set(header)
    assert list((out / "tensorboard").rglob("events*"))
    assert "codebook_size: 32" in (out / "config.yaml").read_text()


@pytest.mark.parametrize("codebook", ["vq", "fsq", "ibq", "lfq", "bsq"])
def test_a_resumed_run_of_another_codebook_ends_as_one_that_did_not_stop(shards, tmp_path, run_command, codebook):
    """Idle codes of vq (quantizer "ema") are moved at random, and its averages are no parameters."""
    more = [f"model={codebook}", *(["model.idle=1", "model.decay=0.5"] if codebook == "vq" else [])]
    more += ["model.image_size=16", "model.num_layers=2", "model.hidden_dim=16", "model.num_resnet_blocks=1"]
    more += [
        "callbacks.keep=last",
        "optim.schedule=constant",
        "callbacks.checkpoint_every=1",
        "callbacks.ema_decay=0.5",
    ]
    arguments = {steps: small(shards, tmp_path / "parts", steps, *more)[1:] for steps in (2, 5)}  # model= is another
    whole = run_command(train_vae.main, *small(shards, tmp_path / "whole", 5, *more)[1:])
    run_command(train_vae.main, *arguments[2])
    resumed = run_command(train_vae.main, *arguments[5], "resume=true")
    a, b = (dalle_pytorch.load(path, kind="vae") for path in (whole, resumed))
    assert a.config.quantizer == {"vq": "ema"}.get(codebook, codebook)
    assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def test_train_dalle(shards, vae_file, tmp_path, run_command):
    out = tmp_path / "run"
    printed = run_command(train_dalle.main, *small(shards, out, 3, f"vae={vae_file}", "text.vocab_size=270"))
    dalle = dalle_pytorch.load(printed, kind="dalle")
    assert dalle.config.text_vocab_size == dalle.text_tokenizer.vocab_size <= 270
    assert dalle.text_tokenizer.encode("a red square")
    vae = dalle_pytorch.load(vae_file).state_dict()
    assert all(torch.equal(tensor, vae[name]) for name, tensor in dalle.vae.state_dict().items())
    assert list((out / "pictures").iterdir())


def test_a_dalle_of_random_orders_resumes_exactly(shards, vae_file, tmp_path, run_command):
    more = [f"vae={vae_file}", "callbacks.keep=last", "optim.schedule=constant", "callbacks.checkpoint_every=1"]
    more += ["model.any_order=true", "model.shift_tokens=false", "random_order={start: 0.5, end: 0.5}"]
    whole = run_command(train_dalle.main, *small(shards, tmp_path / "whole", 4, *more))
    run_command(train_dalle.main, *small(shards, tmp_path / "parts", 2, *more))
    parts = run_command(train_dalle.main, *small(shards, tmp_path / "parts", 4, *more, "resume=true"))
    raster = run_command(train_dalle.main, *small(shards, tmp_path / "raster", 4, *more[:-1], "random_order.end=1e-9"))
    a, b, c = (dalle_pytorch.load(path).state_dict() for path in (whole, parts, raster))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["random_order.start=1"], "model.any_order=true"),
        (["model.any_order=true", "model.shift_tokens=false"], "set random_order.start=1"),
        (["model.any_order=true", "model.shift_tokens=false", "random_order.start=2"], "shares of the images"),
        (["sampling.strategy=random"], "needs a model of any order"),
        (
            ["model.any_order=true", "model.shift_tokens=false", "random_order={start: 0, end: 1, shape: constant}"],
            "set",
        ),
        (["model=bart", "random_order.start=1"], "not there for a DALL·E mini"),
    ],
)
def test_orders_that_are_not_learned_are_refused(shards, vae_file, tmp_path, run_command, arguments, message):
    code, error = run_command(train_dalle.main, *small(shards, tmp_path / "run", 2, f"vae={vae_file}", *arguments))
    assert code in (1, 2)
    assert message in error


def test_train_dalle_without_cached_tokens(shards, vae_file, tmp_path, run_command):
    arguments = small(shards, tmp_path / "run", 2, f"vae={vae_file}", "data.token_crops=0", "data.jitter=1")
    assert run_command(train_dalle.main, *arguments).endswith("dalle.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=fsq", "model.reinmax=true"], "model.reinmax is no setting"),
        (
            ["model=vq", "kl_weight.end=1.0"],
            "kl_weight.end is a setting of a DiscreteVAE's loss, and model=vq has none",
        ),
        (["model=vq", "usage_weight={start: 1.0}"], "usage_weight is a setting of a DiscreteVAE's loss"),
        (["model=tiny", "model.levels=[5,5]"], "model.levels is no setting"),
        (["model=vq", "model.entropy=0.1"], "entropy is a setting of quantizer=ibq or lfq or bsq"),
        (["model=fsq", "model.codebook_size=999"], "make 1000 codes, and codebook_size is 999"),
        (["vq.codebook_size=8"], "vq is no setting any more; say model.NAME=, with model=vq, fsq"),
        (["network=vq"], "network is no setting any more; model=NAME chooses the network"),
        (["launcher.timeout_min=3"], "hydra.launcher"),
        (["trainer.accumulate_grad_batches=2"], "data.batch_size=128 data.micro_batch_size=64"),
    ],
)
def test_settings_of_the_network_that_is_not_trained_are_refused(shards, tmp_path, run_command, arguments, message):
    code, error = run_command(train_vae.main, f"data.path={shards}", f"out={tmp_path / 'run'}", *arguments)
    assert code in (1, 2)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_train_dalle_on_drawn_codes(shards, vae_file, tmp_path, run_command):
    weights = {}
    for name, codes in {"likeliest": "likeliest", "sampled": "sampled", "soft": "soft", "again": "soft"}.items():
        settings = small(shards, tmp_path / name, 2, f"vae={vae_file}", f"image_codes={codes}", "data.token_crops=0")
        weights[name] = dalle_pytorch.load(run_command(train_dalle.main, *settings)).image_head.weight
    assert torch.equal(weights["soft"], weights["again"])
    assert not torch.equal(weights["soft"], weights["sampled"])
    assert not torch.equal(weights["sampled"], weights["likeliest"])


def test_drawn_codes_follow_the_tokenizers_probabilities(vae_file):
    vae = dalle_pytorch.load(vae_file, kind="vae")
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = vae.encode_logits(image).flatten(2).mT.softmax(dim=-1)[0]
    tokens, probabilities = sampled_codes(vae, image.expand(2000, -1, -1, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(probabilities[0], expected)
    found = torch.nn.functional.one_hot(tokens, vae.codebook_size).float().mean(dim=0)
    # a share's standard deviation is at most 0.5 / sqrt(2000) = 0.011
    torch.testing.assert_close(found, expected, atol=0.055, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["image_codes=hard"], "likeliest, sampled, soft"),
        (["image_codes=soft", "model=dalle_mini"], "DALL·E mini"),
    ],
)
def test_unknown_codes_are_refused(shards, vae_file, tmp_path, run_command, arguments, message):
    code, error = run_command(train_dalle.main, *small(shards, tmp_path / "run", 2, f"vae={vae_file}", *arguments))
    assert code in (1, 2)
    assert message in error


def test_codes_are_not_drawn_of_tokens_or_of_tokenizers_without_probabilities(make_dalle):
    config = TrainDALLEConfig(model=DALLEConfig(), image_codes="sampled")
    with pytest.raises(ConfigError, match="holds tokens"):
        check_codes(config, make_dalle().vae, cached=True)
    with pytest.raises(ConfigError, match="gives none"):
        check_codes(config, Sizes(16, 4, 12), cached=False)
    check_codes(TrainDALLEConfig(model=DALLEConfig()), Sizes(16, 4, 12), cached=True)


def test_train_clip_with_a_dalles_text_tokenizer(shards, make_dalle, tmp_path, run_command):
    dalle = make_dalle()
    dalle.text_tokenizer = dalle_pytorch.text.BPETokenizer.train(["a red square"], 260)
    dalle_pytorch.save(dalle, tmp_path / "dalle.safetensors")
    arguments = small(shards, tmp_path / "run", 3, f"text.tokenizer_from={tmp_path}/dalle.safetensors")
    clip = dalle_pytorch.load(run_command(train_clip.main, *arguments, "model.text_len=32"))
    assert clip.text_tokenizer.state() == dalle.text_tokenizer.state()
    assert list((tmp_path / "run/pictures").iterdir())


def test_train_clip_holds_the_logit_scale_at_its_bound(shards, tmp_path, run_command, monkeypatch):
    """However far up it is, one step later it is at 100: that of a file of before the bound, for example."""
    init = CLIP.__init__

    def far_up(self, config):
        init(self, config)
        with torch.no_grad():
            self.log_logit_scale.fill_(13.6)

    monkeypatch.setattr(CLIP, "__init__", far_up)
    arguments = small(shards, tmp_path / "run", 1, "callbacks.ema_decay=0", "model.text_len=32")
    clip = dalle_pytorch.load(run_command(train_clip.main, *arguments))
    assert clip.log_logit_scale.item() == pytest.approx(math.log(100))


def test_a_resumed_run_ends_as_one_that_did_not_stop(shards, tmp_path, run_command):
    more = ["callbacks.keep=last", "data.jitter=2", "optim.schedule=constant", "gumbel_tau.shape=constant"]
    more += ["kl_weight.shape=constant", "usage_weight.shape=constant", "callbacks.checkpoint_every=1"]
    whole = run_command(train_vae.main, *small(shards, tmp_path / "whole", 5, *more))
    out = tmp_path / "parts"
    run_command(train_vae.main, *small(shards, out, 2, *more))  # in the middle of an epoch of 3
    resumed = run_command(train_vae.main, *small(shards, out, 5, *more, "resume=true"))
    a, b = (dalle_pytorch.load(path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert checkpoint.read_header(resumed)["training"]["step"] == 5


def test_a_resumed_dalle_ends_as_one_that_did_not_stop(shards, vae_file, tmp_path, run_command):
    """With every source of randomness on: BPE, caption and token dropout, dropout, augmented pictures, captions."""
    more = [f"vae={vae_file}", "callbacks.keep=last", "optim.schedule=constant", "callbacks.checkpoint_every=1"]
    more += ["text.bpe_dropout=0.3", "model.caption_dropout=0.3", "model.token_dropout=0.3", "model.ff_dropout=0.2"]
    more += ["data.token_crops=0", "data.jitter=2", "data.caption_weights=[1,2]"]
    more += ["model.contrast_weight=0.5", "contrast_phrases=[red,green,blue]"]
    whole = run_command(train_dalle.main, *small(shards, tmp_path / "whole", 5, *more))
    out = tmp_path / "parts"
    run_command(train_dalle.main, *small(shards, out, 2, *more))
    resumed = run_command(train_dalle.main, *small(shards, out, 5, *more, "resume=true"))
    a, b = (dalle_pytorch.load(path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    moved = dalle_pytorch.load(out / "checkpoints/step_00000004.ckpt").state_dict()
    assert not all(torch.equal(a[name], moved[name]) for name in a)


def test_checkpoints_hold_the_averaged_weights_and_load_as_models(shards, tmp_path, run_command):
    arguments = small(shards, tmp_path, 2, "callbacks.ema_decay=0.5", "out=" + str(tmp_path / "run"))
    kept = dalle_pytorch.load(run_command(train_vae.main, *arguments)).state_dict()
    path = tmp_path / "run/checkpoints/step_00000002.ckpt"
    averaged = dalle_pytorch.load(path, kind="vae").state_dict()
    content = torch.load(path, weights_only=True)
    assert (content["kind"], content["version"]) == ("vae", 1)
    current = {k.removeprefix("net."): v for k, v in content["current_model_state"].items()}
    assert all(torch.equal(kept[name], averaged[name]) for name in kept)
    assert not all(torch.equal(current[name], averaged[name]) for name in kept)


def test_a_run_without_validation_keeps_its_last_weights(shards, tmp_path, run_command):
    """There is no best then, though checkpoints were written on the way."""
    more = ["trainer.limit_val_batches=0", "callbacks.checkpoint_every=2", "callbacks.ema_decay=0"]
    printed = run_command(train_vae.main, *small(shards, tmp_path / "run", 5, *more))
    assert checkpoint.read_header(printed)["training"] == {"step": 5, "kept": "last"}


def test_a_run_never_overwrites_another(shards, tmp_path, run_command):
    (tmp_path / "notes.txt").write_text("mine")
    code, error = run_command(train_vae.main, *small(shards, tmp_path))
    assert code == 1
    assert str(tmp_path) in error
    assert "resume=true" in error
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert run_command(train_vae.main, "resume=true", f"data.path={shards}")[0] == 2


def test_resuming_with_another_model_names_both_numbers(shards, vae_file, tmp_path, run_command):
    out = tmp_path / "run"
    run_command(train_dalle.main, *small(shards, out, 2, f"vae={vae_file}"))
    vae = dalle_pytorch.DiscreteVAE(
        dalle_pytorch.DiscreteVAEConfig(image_size=16, num_layers=2, codebook_size=48, codebook_dim=8, hidden_dim=8)
    )
    dalle_pytorch.save(vae, tmp_path / "other.safetensors")
    arguments = small(shards, out, 4, f"vae={tmp_path}/other.safetensors", "resume=true", "model.depth=1")
    code, error = run_command(train_dalle.main, *arguments)
    assert code == 1
    assert "vae.codebook_size was 32, is 48" in error
    assert "depth was 2, is 1" in error


def test_resuming_with_another_vae_of_the_same_sizes_is_refused(shards, vae_file, tmp_path, run_command):
    """Its tokens would mean something else, and nothing but the loss would tell."""
    out = tmp_path / "run"
    run_command(train_dalle.main, *small(shards, out, 2, f"vae={vae_file}"))
    other = dalle_pytorch.load(vae_file)
    with torch.no_grad():
        other.codebook.weight.mul_(2)
    dalle_pytorch.save(other, tmp_path / "other.safetensors")
    code, error = run_command(
        train_dalle.main, *small(shards, out, 4, f"vae={tmp_path}/other.safetensors", "resume=true")
    )
    assert code == 1
    assert "another vae" in error
    assert "codebook.weight" in error


def test_a_vae_of_another_picture_size_names_both(shards, tmp_path, run_command):
    vae = dalle_pytorch.DiscreteVAE(dalle_pytorch.DiscreteVAEConfig(image_size=32, hidden_dim=8, codebook_dim=8))
    dalle_pytorch.save(vae, tmp_path / "vae.safetensors")
    code, error = run_command(train_dalle.main, *small(shards, tmp_path / "run", 2, f"vae={tmp_path}/vae.safetensors"))
    assert code == 1
    assert "16 x 16" in error
    assert "32 x 32" in error


def test_code_statistics_have_closed_forms():
    counts = count_codes(torch.tensor([[0, 1], [1, 1]]), 4)
    assert counts.tolist() == [1, 3, 0, 0]
    assert perplexity(torch.ones(8)).item() == pytest.approx(8)
    assert perplexity(counts).item() == pytest.approx(math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75)))


def test_tiles_keep_every_picture():
    images = torch.rand(5, 3, 4, 4)
    canvas = tile(images, columns=3)
    assert canvas.shape == (3, 10, 16)
    assert torch.equal(canvas[:, :4, 6:10], images[1])
    assert torch.equal(canvas[:, 6:10, :4], images[3])
    assert (canvas[:, 6:, 12:] == 1).all()


def test_wandb_stays_offline_without_a_key(shards, tmp_path, run_command, monkeypatch):
    """It needs no account and no network, and writes into the run's folder."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    result = subprocess.run(
        [sys.executable, "-m", "dalle_pytorch.commands.train_vae"]
        + [str(argument) for argument in small(shards, tmp_path / "run", 2, "logger=wandb")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
