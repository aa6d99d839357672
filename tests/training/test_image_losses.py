"""LPIPS and an adversary: one backward pass does what two would; trainings stop, split and go on exactly."""

import copy
import csv

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.commands import train_vae
from dalle_pytorch.models.discriminator import Discriminator, DiscriminatorConfig, discriminator_loss, generator_loss
from dalle_pytorch.models.vq_vae import FSQConfig
from dalle_pytorch.training.image_losses import AdversaryConfig, ImageLosses, PerceptualConfig
from dalle_pytorch.training.vae import make_vae

FSQ = ["model=fsq", "model.image_size=16", "model.num_layers=2", "model.hidden_dim=16", "model.num_resnet_blocks=1"]
VQGAN = [
    "model=vqgan", "model.image_size=16", "model.ch=8", "model.ch_mult=[1,2]", "model.num_res_blocks=1",
    "model.attention_levels=[]", "model.z_channels=8", "model.embed_dim=4", "model.norm_groups=4",
    "model.codebook_size=16",
]  # fmt: skip
ADVERSARY = [
    "adversary.weight=0.5", "adversary.start=3", "adversary.r1=0.1", "adversary.r1_every=2",
    "adversary.discriminator.width=8", "adversary.discriminator.num_layers=1", "adversary.lr=1e-3",
]  # fmt: skip


@pytest.fixture
def all_losses(vgg_file):
    return [*FSQ, *ADVERSARY, "perceptual.weight=0.1", f"perceptual.network={vgg_file}"]


def settings(shards, out, *more):
    return [
        "trainer=cpu", "data.batch_size=4", "trainer.val_check_interval=8", "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false", "callbacks.picture_every=0", "callbacks.checkpoint_every=6",
        "callbacks.keep=last", f"data.path={shards}", f"out={out}", "trainer.max_steps=12", *more,
    ]  # fmt: skip


def logged(out, name):
    with (out / "csv/version_0/metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def last_state(out):
    """All that is trained, the discriminator and its optimiser, too."""
    content = torch.load(out / "checkpoints/step_00000012.ckpt", weights_only=True)
    moments = content["optimizer_states"][0]["state"]
    return content["state_dict"] | {f"{n}.{k}": v for n, entry in moments.items() for k, v in entry.items()}


def make(lpips, *, adaptive=False, norm="group", loss="hinge", r1=0.0):
    """A tokenizer and its losses, with an adversary as heavy as everything else."""
    net = make_vae(FSQConfig(image_size=16, num_layers=2, hidden_dim=16, num_resnet_blocks=1))
    config = DiscriminatorConfig(width=8, num_layers=1, norm=norm)
    adversary = AdversaryConfig(weight=0.5, adaptive=adaptive, loss=loss, r1=r1, r1_every=1, discriminator=config)
    perceptual = PerceptualConfig(weight=0.3, network="given as lpips")
    return net, ImageLosses(perceptual, adversary, lpips=lpips)


@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
@pytest.mark.parametrize("norm", ["group", "spectral", "none"])
def test_one_backward_pass_gives_both_players_their_own_gradients(lpips, norm, loss):
    """The tokenizer's are those of its losses, the discriminator's those of its own, R1 included."""
    net, losses = make(lpips, norm=norm, loss=loss, r1=2.0)
    images = torch.rand(4, 3, 16, 16)
    total, parts = losses(net, net.reconstruct(images).output, images, 0)
    total.backward()
    found = {name: p.grad.clone() for name, p in [*net.named_parameters(), *losses.named_parameters()]}

    net.zero_grad(), losses.zero_grad()
    output = net.reconstruct(images).output
    copies = net.to_pixels(output, clamp=False)
    near = net.reconstruction_error(output, images) + 0.3 * lpips(copies, images).mean()
    against = generator_loss(losses.discriminator(copies), loss)
    (near + 0.5 * against).backward()
    tokenizer = {name: p.grad.clone() for name, p in net.named_parameters()}
    losses.zero_grad()
    seen = images.clone().requires_grad_()
    scores = losses.discriminator(seen)
    (slope,) = torch.autograd.grad(scores.mean(dim=(1, 2, 3)).sum(), seen, create_graph=True)
    penalty = slope.square().sum(dim=(1, 2, 3)).mean()
    own = discriminator_loss(scores, losses.discriminator(copies.detach()), loss) + penalty
    own.backward()
    expected = tokenizer | {name: p.grad for name, p in losses.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(total, near + 0.5 * against + own)
    assert set(parts) >= {"reconstruction", "lpips", "adversarial", "discriminator", "r1"}


def test_the_adaptive_weight_makes_gradients_as_long_as_asked_for(lpips):
    """From the second step on: it is measured in the one before."""
    net, losses = make(lpips, adaptive=True)
    images = torch.rand(4, 3, 16, 16)
    weights = []
    for step in range(2):
        _, parts = losses(net, net.reconstruct(images).output, images, step)
        weights.append(float(parts["adversary_weight"]))
        losses.end_step(step, None)
    leaf = net.reconstruct(images).output.detach().requires_grad_()
    copies = net.to_pixels(leaf, clamp=False)
    near = net.reconstruction_error(leaf, images) + 0.3 * lpips(copies, images).mean()
    lengths = [
        torch.autograd.grad(loss, leaf, retain_graph=True)[0].norm().item()
        for loss in (near, generator_loss(losses.discriminator(copies), "hinge"))
    ]
    assert weights == [0, pytest.approx(0.5 * lengths[0] / lengths[1], rel=1e-3)]


def test_without_other_losses_it_is_the_pixels_error(lpips):
    net = make_vae(FSQConfig(image_size=16, num_layers=2, hidden_dim=16, num_resnet_blocks=1))
    losses, images = ImageLosses(PerceptualConfig(), AdversaryConfig()), torch.rand(4, 3, 16, 16)
    output = net.reconstruct(images).output
    assert torch.equal(losses(net, output, images, 0).loss, net.reconstruction_error(output, images))
    assert not list(losses.parameters())
    assert not losses.groups()


def test_lpips_is_no_part_of_a_checkpoint_but_moves_along(lpips):
    _, losses = make(lpips)
    assert all(name.startswith(("discriminator.", "norms", "sums")) for name in losses.state_dict())
    assert losses.double().lpips.net.features["0"].weight.dtype == torch.float64
    losses.float()


@pytest.mark.parametrize(("num_layers", "reach"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_its_patch_alone(num_layers, reach):
    """Without norms, which look at the whole image."""
    net = Discriminator(DiscriminatorConfig(width=8, num_layers=num_layers, norm="none"))
    images = torch.rand(1, 3, 128, 128, requires_grad=True)
    scores = net(images)
    scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2].backward()
    seen = images.grad.abs().sum(dim=(0, 1))
    rows = seen.sum(dim=1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == reach


def test_spectral_norms_follow_the_weights_once_a_step():
    """However many passes a step has; the largest singular value tends to 1."""
    net = Discriminator(DiscriminatorConfig(width=8, num_layers=1, norm="spectral")).train()
    layer = net.layers[2]
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(3).add_(torch.randn_like(layer.weight))
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(net(images), net(images))
    for _ in range(100):
        net.follow_weights()
    largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
    torch.testing.assert_close(largest, torch.tensor(1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("norm", "model"), [("group", []), ("spectral", []), ("group", VQGAN)])
def test_a_resumed_run_ends_as_one_that_did_not_stop(
    shards, all_losses, tmp_path, run_command, unchecked_shapes, norm, model
):
    more = [*(model or FSQ), *all_losses[len(FSQ) :], f"adversary.discriminator.norm={norm}"]
    run_command(train_vae.main, *settings(shards, tmp_path / "whole", *more))
    run_command(train_vae.main, *settings(shards, tmp_path / "parts", *more))
    for name in ("step_00000012.ckpt", "best.ckpt"):
        (tmp_path / "parts/checkpoints" / name).unlink()
    (tmp_path / "parts/vae.safetensors").unlink()
    run_command(train_vae.main, *settings(shards, tmp_path / "parts", *more, "resume=true"))
    a, b = last_state(tmp_path / "whole"), last_state(tmp_path / "parts")
    assert any("discriminator" in name for name in a)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    files = [dalle_pytorch.load(tmp_path / name / "vae.safetensors").state_dict() for name in ("whole", "parts")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at it
def test_compiled_networks_learn_the_same(shards, vgg_file, tmp_path, run_command, unchecked_shapes):
    """Up to rounding, which Adam's first steps make larger."""
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        more = [*FSQ, "perceptual.weight=0.1", f"perceptual.network={vgg_file}", "trainer.limit_val_batches=0"]
        more += [f"compile={compiled}", "data.jitter=0", "trainer.max_steps=3", "optim.lr=1e-4"]
        run_command(train_vae.main, *settings(shards, tmp_path / name, *more))
    for loss in ("train/loss", "train/lpips"):
        plain, compiled = (logged(tmp_path / name, loss) for name in ("plain", "compiled"))
        assert plain == pytest.approx(compiled, rel=1e-3)


def test_bf16_trains_with_all_losses(shards, all_losses, tmp_path, run_command, unchecked_shapes):
    """The losses are those of fp32 but for rounding. (A CPU that has no bf16 trains in fp32 instead.)"""
    for name, precision in (("whole", "32-true"), ("half", "bf16-mixed")):
        more = [*all_losses, "data.jitter=0", "trainer.max_steps=3", "optim.lr=1e-4", f"trainer.precision={precision}"]
        run_command(train_vae.main, *settings(shards, tmp_path / name, *more))
    whole, half = (logged(tmp_path / name, "train/loss") for name in ("whole", "half"))
    assert whole == pytest.approx(half, rel=0.05)


def test_an_accumulated_step_is_one_step(shards, all_losses, tmp_path, run_command, unchecked_shapes):
    more = [*all_losses, "data.jitter=0", "adversary.discriminator.norm=spectral", "callbacks.ema_decay=0"]
    for name, size in (("whole", 4), ("parts", 1)):
        run_command(train_vae.main, *settings(shards, tmp_path / name, *more, f"data.micro_batch_size={size}"))
    a, b = last_state(tmp_path / "whole"), last_state(tmp_path / "parts")
    for state in (a, b):  # gradients of a part's mean are longer, both kinds of them
        state["losses.norms"] = state["losses.norms"][:1] / state["losses.norms"][1]
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert logged(tmp_path / "parts", "train/adversary_weight")[-1] > 0


def test_a_run_is_not_resumed_with_another_adversary(shards, all_losses, tmp_path, run_command, unchecked_shapes):
    arguments = settings(shards, tmp_path / "run", *all_losses, "trainer.max_steps=2")
    run_command(train_vae.main, *arguments)
    code, error = run_command(
        train_vae.main, *arguments, "resume=true", "trainer.max_steps=4", "adversary.adaptive=false"
    )
    assert code == 1
    assert "begun with other settings of adversary" in error
    assert "init=" in error


def test_the_best_checkpoint_is_that_of_the_lowest_lpips(shards, all_losses, tmp_path, run_command, unchecked_shapes):
    more = ["trainer.val_check_interval=3", "callbacks.keep=best"]
    run_command(train_vae.main, *settings(shards, tmp_path / "run", *all_losses, *more))
    kept = checkpoint.read_header(tmp_path / "run/vae.safetensors")["training"]
    assert kept["val/lpips"] == pytest.approx(min(logged(tmp_path / "run", "val/lpips")))


def test_what_a_training_looks_through_is_not_copied_with_it(lpips):
    """Averages are made of a copy."""
    _, losses = make(lpips)
    assert copy.deepcopy(losses).lpips.net is losses.lpips.net


def test_the_adversary_begins_at_its_step(shards, all_losses, tmp_path, run_command, unchecked_shapes):
    """Until then its weights rest, and so do the moments of its optimiser."""
    run_command(train_vae.main, *settings(shards, tmp_path / "run", *all_losses))
    assert len(logged(tmp_path / "run", "train/discriminator")) == 12 - 3
    steps = torch.load(tmp_path / "run/checkpoints/step_00000012.ckpt", weights_only=True)["optimizer_states"][0]
    ids = steps["param_groups"][-1]["params"]
    assert steps["param_groups"][-1]["name"] == "discriminator"
    assert {int(steps["state"][number]["step"]) for number in ids} == {12 - 3}
    assert {int(entry["step"]) for number, entry in steps["state"].items() if number not in ids} == {12}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["perceptual.weight=1"], "perceptual.network="),
        (["perceptual.weight=1", "perceptual.network=nothing.pth"], "no file or folder nothing.pth"),
        (["perceptual.weight=1", "perceptual.network=x", "model.channels=1"], "perceptual.weight=0"),
        (["adversary.weight=-1"], "weight"),
        (["adversary.loss=wgan"], "hinge, non_saturating"),
        (["adversary.weight=nan"], "finite"),
        (["adversary.start=5"], "adversary.start changes nothing while adversary.weight is 0"),
        (["adversary.weight=1"], "adversary.discriminator needs images of at least 24 pixels, and they have 16"),
        (["adversary.discriminator.norm=batch"], "group, spectral, none"),
        (["adversary.discriminator.width=12"], "multiple of 8"),
        (["adversary.betas=[0.5]"], "betas"),
    ],
)
def test_settings_that_make_no_sense_are_refused(shards, tmp_path, run_command, more, message):
    code, error = run_command(train_vae.main, *settings(shards, tmp_path / "run", *FSQ, *more))
    assert code != 0
    assert message in error
    assert not (tmp_path / "run").exists()
