"""A few pictures of 16 x 16 as shards, and commands run in this process."""

import sys
from io import BytesIO

import pytest
import torch
from PIL import Image

import dalle_pytorch
from dalle_pytorch.data.shards import ShardWriter
from dalle_pytorch.models.lpips import LPIPS

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 220)}


def write_shards(folder, *, size=16, train=12, val=6):
    """Pictures of one colour each, with two captions."""
    with ShardWriter(folder, name="colours", image_size=size) as writer:
        for split, count in (("train", train), ("val", val)):
            for i in range(count):
                colour = list(COLOURS)[i % len(COLOURS)]
                shade = tuple(c + i for c in COLOURS[colour])
                data = BytesIO()
                Image.new("RGB", (size, size), shade).save(data, "PNG")
                captions = [f"a {colour} square", f"{colour} square {i}"]
                writer.write(split, f"{split}{i}", data.getvalue(), "png", {"captions": captions})
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def odd_shards(tmp_path_factory):
    """Five pictures to validate on: two processes cannot share them evenly."""
    return write_shards(tmp_path_factory.mktemp("odd") / "colours", val=5)


@pytest.fixture(scope="session")
def vae_file(tmp_path_factory):
    """An untrained VAE of 4 x 4 tokens."""
    config = dalle_pytorch.DiscreteVAEConfig(
        image_size=16, num_layers=2, codebook_size=32, codebook_dim=8, hidden_dim=8
    )
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    torch.manual_seed(0)
    dalle_pytorch.save(dalle_pytorch.DiscreteVAE(config), path)
    return path


@pytest.fixture(scope="session")
def lpips():
    """Of random weights, with heads that are not negative, as the published ones."""
    torch.manual_seed(0)
    net = LPIPS()
    for head in net.heads:
        torch.nn.init.uniform_(head, 0, 1 / head.numel())
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def vgg_file(lpips, tmp_path_factory):
    """In the layout of torchvision's vgg16-397923af.pth."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({name: value for name, value in lpips.state_dict().items() if name.startswith("features")}, path)
    return path


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Run a command's main with arguments; returns the last line it printed, or the exit code and its errors."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return capsys.readouterr().out.strip().splitlines()[-1]

    return run
