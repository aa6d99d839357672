"""The weights that come along: whole, small enough to download, found by name, used where no others are named."""

import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra._internal.utils import get_args_parser

import dalle_pytorch
from dalle_pytorch.checkpoints import released
from dalle_pytorch.checkpoints.loading import load_vae, read_header
from dalle_pytorch.commands import generate
from dalle_pytorch.config import implied

ROOT = Path(__file__).parent.parent
KINDS = ("clip", "dalle", "vae")


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """The release in another folder, for damage."""
    shutil.copytree(released.folder("emoji"), tmp_path / "emoji")
    monkeypatch.setattr(released, "PLACES", (tmp_path,))
    return tmp_path / "emoji"


def test_files_are_whole_and_small():
    sizes = [released.file("emoji", kind).stat().st_size for kind in KINDS]
    assert max(sizes) <= 15e6
    assert sum(sizes) <= 45e6


def test_the_wheel_takes_every_file_along():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    names = ["README.md", released.SUMS, *(f"{kind}.safetensors" for kind in KINDS)]
    assert included == {f"weights/emoji/{name}": f"dalle_pytorch/weights/emoji/{name}" for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_loaded_by_name_and_stored_in_half_precision(kind):
    model = dalle_pytorch.load("emoji", kind=kind, dtype=None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert read_header("emoji", kind=kind)["kind"] == {"vae": "vq_vae"}.get(kind, kind)


def test_the_name_alone_is_the_dalle_with_its_image_tokenizer():
    dalle = dalle_pytorch.load("emoji")
    assert isinstance(dalle, dalle_pytorch.DALLE)
    assert read_header("emoji")["kind"] == "dalle"
    alone, carried = dalle_pytorch.load("emoji", kind="vae").state_dict(), load_vae("emoji").state_dict()
    assert alone.keys() == carried.keys() == dalle.vae.state_dict().keys()
    assert all(torch.equal(alone[name], carried[name]) for name in alone)


def test_it_draws_and_ranks():
    generator = dalle_pytorch.Generator(dalle_pytorch.load("emoji"), dalle_pytorch.load("emoji", kind="clip"))
    candidates, ranking = generator.generate("a red apple", num_candidates=3, num_keep=2)
    assert candidates.images.shape == (3, 3, 64, 64)
    assert ranking.scores is not None
    assert ranking.scores[0] >= ranking.scores[1]


def test_a_kind_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"emoji has no probe: it has clip\.safetensors, dalle\.safetensors"):
        dalle_pytorch.load("emoji", kind="probe")


def test_damaged_and_missing_files_are_named_with_the_mend(moved):
    clip, dalle = moved / "clip.safetensors", moved / "dalle.safetensors"
    with clip.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(ValueError, match=r"clip\.safetensors is damaged.*git checkout"):
        released.file("emoji", "clip")
    dalle.unlink()
    with pytest.raises(FileNotFoundError, match=r"dalle\.safetensors is missing: git checkout"):
        released.file("emoji")
    (moved / released.SUMS).unlink()
    with pytest.raises(FileNotFoundError, match="weights emoji did not come with this installation"):
        released.file("emoji")


def test_a_file_of_that_name_comes_first_but_no_folder(tmp_path, monkeypatch, tiny_vae):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert isinstance(dalle_pytorch.load("emoji"), dalle_pytorch.DALLE)
    (tmp_path / "emoji").rmdir()
    dalle_pytorch.save(tiny_vae, tmp_path / "emoji")
    assert type(dalle_pytorch.load("emoji")) is type(tiny_vae)


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [
        (["p=x"], ["a=1", "b=2", "p=x"]),
        (["p=x", "c=mine"], ["a=1", "p=x", "c=mine"]),
        (["+a=x"], ["b=2", "+a=x"]),
        (["~a"], ["b=2", "~a"]),
        (["a=x", "c=y"], ["a=x", "c=y"]),
        (["p=a=x"], ["a=1", "b=2", "p=a=x"]),
        (["-m", "p=x"], ["-m", "a=1", "b=2", "p=x"]),
        (["p=x", "-m"], ["a=1", "b=2", "p=x", "-m"]),
        (["--cfg", "job", "p=x"], ["--cfg", "job", "a=1", "b=2", "p=x"]),
        (["--help"], ["--help", "a=1", "b=2"]),
        (["--config-dir=x", "p=x"], ["--config-dir=x", "a=1", "b=2", "p=x"]),
    ],
)
def test_overrides_are_implied_unless_the_command_line_has_one_of_their_keys(arguments, whole):
    found = implied(arguments, {"a=1": ("a",), "b=2": ("b", "c")})
    assert found == whole
    overrides = get_args_parser().parse_args(found).overrides  # Hydra's own parser reads them
    assert overrides == [item for item in whole if not item.startswith("-") and item != "job"]


def test_generate_draws_with_them_where_no_model_is_named(monkeypatch):
    seen = []
    monkeypatch.setattr(generate.GenerateConfig, "prompts", lambda self: seen.append(self) or sys.exit(0))
    for extra in ([], ["sampling.cfg_scale=1", "clip=mine"], ["weights=mine"], ["experiment=emoji", "dalle=mine"]):
        monkeypatch.setattr(sys, "argv", ["generate.py", 'prompt="a red apple"', *extra])
        before = list(sys.argv)
        with pytest.raises(SystemExit):
            generate.main()
        assert sys.argv == before
    plain, unguided, mine, settings = seen
    with initialize_config_module("dalle_pytorch.configs", version_base="1.3"):
        card = compose("generate", overrides=["experiment=emoji"])
    assert (plain.weights, plain.clip) == ("emoji", "emoji")
    assert plain.sampling.cfg_scale == card.sampling.cfg_scale != 1
    assert (unguided.weights, unguided.clip, unguided.sampling.cfg_scale) == ("emoji", "mine", 1)
    assert (mine.weights, mine.clip, mine.sampling.cfg_scale) == ("mine", None, 1)
    assert (settings.model(), settings.clip, settings.sampling.cfg_scale) == ("mine", None, card.sampling.cfg_scale)
