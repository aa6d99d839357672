"""Training of a probe through its command, on small emoji-like shards."""

import io
from types import SimpleNamespace

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.checkpoint import weights_sha256
from dalle_pytorch.commands import train_probe
from dalle_pytorch.data.shards import ShardWriter
from dalle_pytorch.images import to_pil
from dalle_pytorch.models.probe import Probe, ProbeConfig
from dalle_pytorch.training.probe import LitProbe, TrainProbeConfig, softened, through

SMALL = [
    "model.image_size=16", "model.width=8", "model.stages=2", "trainer=cpu", "data.batch_size=8", "data.jitter=1",
    "trainer.val_check_interval=10", "trainer.enable_progress_bar=false", "logger=none", "optim.warmup_steps=0",
]  # fmt: skip
CONCEPTS = {"apple": (0.9, 0.1, 0.1), "leaf": (0.1, 0.8, 0.1), "sea": (0.1, 0.1, 0.9)}


def picture(concept, style, number):
    """One colour on white; the style is the side that it is on."""
    image = torch.ones(3, 16, 16)
    part = image[:, :, :8] if style == "noto" else image[:, :8]
    part[:] = torch.tensor(CONCEPTS[concept])[:, None, None] * (0.8 + 0.05 * number)
    data = io.BytesIO()
    to_pil(image).save(data, "PNG")
    return data.getvalue()


@pytest.fixture(scope="session")
def factor_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factors") / "shards"
    with ShardWriter(folder, name="factors", image_size=16) as writer:
        for split, count in (("train", 3), ("val", 1)):
            for concept in CONCEPTS:
                for style in ("noto", "fluent"):
                    for number in range(count):
                        meta = {"captions": [concept], "concept": concept, "style": style}
                        key = f"{split}-{concept}-{style}-{number}"
                        writer.write(split, key, picture(concept, style, number), "png", meta)
        meta = {"captions": ["rare"], "concept": "rare", "style": "noto"}
        writer.write("train", "rare", picture("apple", "noto", 0), "png", meta)
    return folder


def small(shards, out, steps, *more):
    return [*SMALL, f"data.path={shards}", f"out={out}", f"trainer.max_steps={steps}", *more]


def test_a_probe_learns_the_factors_of_its_data(factor_shards, tmp_path, run_command):
    """Two styles and three concepts; of the fourth there are too few pictures."""
    arguments = small(factor_shards, tmp_path / "run", 60, "callbacks.picture_every=10", "callbacks.ema_decay=0.9")
    printed = run_command(train_probe.main, *arguments)
    assert printed == str(tmp_path / "run/probe.safetensors")
    probe = dalle_pytorch.load(printed, kind="probe")
    assert probe.config.classes == {"style": ["fluent", "noto"], "concept": ["apple", "leaf", "sea"]}
    notes = checkpoint.read_header(printed)["training"]
    assert notes["kept"] == "best"
    assert notes["val/accuracy"] == 1
    assert list((tmp_path / "run/pictures").iterdir())


def test_a_resumed_probe_ends_as_one_that_did_not_stop(factor_shards, tmp_path, run_command):
    more = [
        "callbacks.keep=last",
        "optim.schedule=constant",
        "callbacks.checkpoint_every=1",
        "callbacks.picture_every=0",
    ]
    whole = run_command(train_probe.main, *small(factor_shards, tmp_path / "whole", 4, *more))
    run_command(train_probe.main, *small(factor_shards, tmp_path / "parts", 3, *more))
    resumed = run_command(train_probe.main, *small(factor_shards, tmp_path / "parts", 4, *more, "resume=true"))
    a, b = (dalle_pytorch.load(path).state_dict() for path in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_pictures_pass_through_the_image_tokenizer_of_the_judged(factor_shards, tmp_path, run_command, tiny_vae):
    """The command: the result is a probe alone, without the tokenizer; sizes that do not fit are refused at once."""
    path = tmp_path / "vae.safetensors"
    dalle_pytorch.save(tiny_vae, path)
    arguments = small(factor_shards, tmp_path / "run", 10, f"vae={path}", "callbacks.picture_every=0")
    assert dalle_pytorch.load(run_command(train_probe.main, *arguments), kind="probe").config.colours == 12
    code, error = run_command(
        train_probe.main, *small(factor_shards, tmp_path / "other", 1, f"vae={path}", "model.image_size=32")
    )
    assert code == 1
    assert "is for 16 pixels, the probe for 32; set model.image_size=16" in error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.5, 2), (1.0, 4)])
def test_a_share_of_a_batch_is_reconstructed_in_its_place(share, count):
    rows = [{"style": "fluent"}, {"style": "noto"}] * 2
    net = Probe(ProbeConfig(image_size=16, width=8, stages=2, classes={"style": ["fluent", "noto"]}))
    lit = LitProbe(net, TrainProbeConfig(decoded=share, soft=0.0), rows, rows, lambda images: 1 - images)
    images = torch.rand(4, 3, 16, 16)
    seen = lit.degraded(images, torch.Generator())
    assert torch.equal(seen, torch.cat([1 - images[:count], images[count:]]))


def test_held_out_pictures_are_looked_at_both_ways(monkeypatch):
    """A probe that takes dark pictures for "noto", and a tokenizer that turns light to dark."""
    net = Probe(ProbeConfig(image_size=16, width=8, stages=2, classes={"style": ["fluent", "noto"]}))
    monkeypatch.setattr(net, "forward", lambda images: {"style": torch.stack([images, 1 - images], 1).mean((2, 3, 4))})
    rows = [{"style": "fluent"}] * 3 + [{"style": "noto"}]
    lit = LitProbe(net, TrainProbeConfig(), rows, rows, lambda images: 1 - images)
    lit.on_validation_epoch_start()
    lit.validation_step({"images": torch.full((4, 3, 16, 16), 0.9), "indices": torch.arange(4)}, 0)
    assert {way: counts.flatten().tolist() for way, counts in lit.counts.items()} == {"": [3, 4], "_decoded": [1, 4]}
    logged = {}
    lit._trainer = SimpleNamespace(world_size=1)
    monkeypatch.setattr(lit, "log", lambda name, value, **_: logged.update({name: float(value)}))
    lit.on_validation_epoch_end()
    assert logged == {"val/style": 0.75, "val/style_decoded": 0.25, "val/accuracy": 0.5}


def test_what_a_tokenizer_gives_back_leaves_it_as_it_is(tiny_vae):
    before = weights_sha256(tiny_vae)
    images = torch.rand(2, 3, 16, 16)
    decoded = through(tiny_vae.train())(images)
    assert tiny_vae.training
    assert torch.equal(decoded, tiny_vae.eval().decode(tiny_vae.encode(images)))
    assert weights_sha256(tiny_vae) == before


def test_data_without_factors_end_with_one_line(shards, tmp_path, run_command):
    code, error = run_command(train_probe.main, *small(shards, tmp_path / "run", 2))
    assert code == 1
    assert "knows no factor" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_pictures": 0}, "min_pictures must be at least 1, got 0"),
        ({"soft": 1.5}, "soft must lie in"),
        ({"decoded": -0.1}, "decoded must lie in"),
        ({"model": ProbeConfig(classes={"a": ["b", "c"]})}, "model.classes is filled from the training split"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        TrainProbeConfig(**settings)


def test_soft_pictures_are_those_of_half_the_size():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(64, 3, 8, 8)
    assert torch.equal(softened(images, 0.0, generator), images)
    coarse = softened(images, 1.0, generator)
    assert not torch.isclose(coarse, images).all(dim=(1, 2, 3)).any()
    flat = torch.full((2, 3, 8, 8), 0.3)
    assert torch.allclose(softened(flat, 1.0, generator), flat)
    half = softened(images, 0.5, generator)
    changed = (half != images).any(dim=(1, 2, 3))
    assert 16 <= changed.sum() <= 48
    assert torch.equal(half[changed], coarse[changed])


def test_pictures_show_right_ones_above_wrong_ones(factor_shards):
    net = Probe(ProbeConfig(image_size=16, width=8, stages=2, classes={"style": ["fluent", "noto"]}))
    with torch.no_grad():
        net.heads[0].weight.zero_()
        net.heads[0].bias.copy_(torch.tensor([1.0, 0.0]))  # sees "fluent" everywhere
    rows = [{"style": "fluent"}, {"style": "noto"}, {}]
    lit = LitProbe(net, TrainProbeConfig(), rows, rows)
    images = torch.stack([torch.full((3, 16, 16), value) for value in (0.2, 0.4, 0.6)])
    shown = lit.pictures({"images": images, "indices": torch.tensor([0, 1, 2])})
    assert shown.shape == (3, 34, 8 * 18 - 2)
    assert [shown[0, 5, 5].item(), shown[0, 5, 23].item()] == pytest.approx([0.2, 0.6])  # none to be wrong about
    assert shown[0, 25, 5].item() == pytest.approx(0.4)
