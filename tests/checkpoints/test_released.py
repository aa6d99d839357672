"""The weights that come along: whole, small enough to download, found by name, used where no others are named."""

import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

import dalle_pytorch
from dalle_pytorch.checkpoints import hub
from dalle_pytorch.checkpoints.loading import load_vae, read_header
from dalle_pytorch.commands import generate
from dalle_pytorch.config import CONFIGS, typed
from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.generation.sampling import SamplingConfig

ROOT = Path(__file__).parents[2]
KINDS = ("clip", "dalle", "vae")


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """The release in another folder, for damage."""
    shutil.copytree(hub.bundled_folder("emoji"), tmp_path / "emoji")
    monkeypatch.setattr(hub, "PLACES", (tmp_path,))
    return tmp_path / "emoji"


def test_files_are_whole_and_small():
    sizes = [hub.fetch("emoji", kind).stat().st_size for kind in KINDS]
    assert max(sizes) <= 15e6
    assert sum(sizes) <= 45e6


def test_the_wheel_takes_every_file_along():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    names = ["README.md", hub.SUMS, *(f"{kind}.safetensors" for kind in KINDS)]
    weights = {f"weights/emoji/{name}": f"dalle_pytorch/weights/emoji/{name}" for name in names}
    assert included == {**weights, "configs": "dalle_pytorch/configs"}


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
        hub.fetch("emoji", "clip")
    dalle.unlink()
    with pytest.raises(FileNotFoundError, match=r"dalle\.safetensors is missing: git checkout"):
        hub.fetch("emoji")
    (moved / hub.SUMS).unlink()
    with pytest.raises(FileNotFoundError, match="weights emoji did not come with this installation"):
        hub.fetch("emoji")


def test_a_file_of_that_name_comes_first_but_no_folder(tmp_path, monkeypatch, tiny_vae):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    assert isinstance(dalle_pytorch.load("emoji"), dalle_pytorch.DALLE)
    (tmp_path / "emoji").rmdir()
    dalle_pytorch.save(tiny_vae, tmp_path / "emoji")
    assert type(dalle_pytorch.load("emoji")) is type(tiny_vae)


def composed(*overrides):
    assert generate.main
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(compose("generate", overrides=["prompt=x", *overrides]), GenerateConfig)


def test_generate_draws_with_them_where_no_model_is_named():
    plain, unguided, mine = composed(), composed("sampling.cfg_scale=1", "clip=mine"), composed("weights=mine")
    card = composed("experiment=emoji", "weights=mine")
    assert (plain.weights, plain.clip, plain.sampling) == ("emoji", "emoji", card.sampling)
    assert card.sampling.cfg_scale != 1
    assert (unguided.weights, unguided.clip, unguided.sampling.cfg_scale) == ("emoji", "mine", 1)
    assert (mine.weights, mine.clip, mine.sampling) == ("mine", None, SamplingConfig())
    assert (card.weights, card.clip) == ("mine", None)


def test_the_old_name_of_the_weights_means_the_same():
    old, new = composed("dalle=mine"), composed("weights=mine")
    assert replace(old, dalle=None, out=new.out) == new
    with pytest.raises(ValueError, match="weights=mine and dalle=other mean the same: give one"):
        composed("weights=mine", "dalle=other")
