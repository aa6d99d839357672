"""Small models, seeded randomness, and what reference implementations gave."""

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import jaxtyping
import pytest
import torch
from hydra.core.config_store import ConfigStore
from safetensors import safe_open
from torch import Tensor

from dalle_pytorch import CLIP, DALLE, CLIPConfig, DALLEConfig, DiscreteVAE, DiscreteVAEConfig
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.models.transformer import ForeignConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig

REFERENCE = Path(__file__).parent / "checkpoints" / "reference"


@pytest.fixture(autouse=True)
def randomness():
    """The same weights and data in every run, on one thread: tiny matrices gain nothing from more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def one_store_of_schemas():
    """Hydra copies all schemas whenever it composes, or lists a group for ``--help``; it changes none."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ConfigStore, "__deepcopy__", lambda store, memo: store, raising=False)
        yield


@pytest.fixture
def unchecked_shapes():
    """Shapes of arguments go unchecked: tests of the parts check them, and in a long test it is half of the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def environment_left_as_found():
    """Lightning writes MASTER_PORT into the environment; a job that a later test starts would inherit it."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def logging_left_as_found():
    """Commands install Hydra's log handlers, which write to a stream that pytest closes after the test."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    for handler in root.handlers[:]:
        if handler not in before:
            root.removeHandler(handler)


@pytest.fixture
def tiny_vae():
    """A 4 x 4 grid of 12 codes over 16 x 16 pictures."""
    return DiscreteVAE(
        DiscreteVAEConfig(image_size=16, num_layers=2, codebook_size=12, codebook_dim=8, hidden_dim=8)
    ).eval()


@pytest.fixture
def make_dalle(tiny_vae):
    """Build a small DALLE with settings of choice, those of ``foreign`` named without it; weights large enough that
    outputs depend on inputs."""

    def make(**settings) -> DALLE:
        defaults = {"dim": 32, "depth": 3, "heads": 2, "head_dim": 16, "text_vocab_size": 9, "text_len": 5}
        foreign = {item.name: settings.pop(item.name) for item in fields(ForeignConfig) if item.name in settings}
        config = DALLEConfig(**{**defaults, **settings}, foreign=ForeignConfig(**foreign))
        dalle = DALLE(config, vae=tiny_vae).eval()
        with torch.no_grad():
            for parameter in dalle.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        return dalle

    return make


@pytest.fixture
def make_bart(tiny_vae):
    """Build a small DALLEBart; weights large enough that outputs depend on inputs."""

    def make(**settings) -> DALLEBart:
        sizes = {
            "dim": 32, "encoder_layers": 2, "decoder_layers": 3, "heads": 2, "ffn_dim": 24, "grid_size": 4,
            "text_vocab_size": 9, "text_positions": 7, "image_vocab_size": 15, "bos_id": 12,
        }  # fmt: skip
        bart = DALLEBart(DALLEBartConfig(**{**sizes, **settings}), vae=tiny_vae).eval()
        with torch.no_grad():
            for parameter in bart.parameters():
                if parameter.requires_grad:
                    parameter += 0.15 * torch.randn_like(parameter)
        return bart

    return make


@pytest.fixture
def tiny_clip():
    """Two small towers over 16 x 16 pictures."""
    return CLIP(
        CLIPConfig(
            dim_text=16,
            dim_image=16,
            dim_latent=8,
            text_vocab_size=9,
            text_len=5,
            text_enc_depth=1,
            text_heads=2,
            visual_enc_depth=1,
            visual_heads=2,
            image_size=16,
            patch_size=4,
        )
    ).eval()


def load_script(name: str) -> ModuleType:
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(f"reference_{name}", REFERENCE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def seeded() -> ModuleType:
    """``reference/seeded.py``: ``fill(state, seed)`` and ``checksum(state)``."""
    return load_script("seeded")


@pytest.fixture(scope="session")
def reference_script() -> Callable[[str], ModuleType]:
    """The script that recorded a fixture, by name; for live comparisons."""
    return load_script


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], tuple[dict[str, Tensor], dict[str, str]]]:
    """Tensors and metadata of a fixture, by name."""

    def read(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118

    return read


@pytest.fixture(scope="session")
def min_dalle_fixture(recorded) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What min-dalle gave, and its settings."""
    tensors, metadata = recorded("min_dalle")
    return tensors, {key: json.loads(value) for key, value in metadata.items()}


@pytest.fixture(scope="session")
def min_dalle_folder(min_dalle_fixture, seeded, tmp_path_factory) -> Path:
    """A folder of min-dalle with the recorded model as mini, and a small VQGAN."""
    notes, root = min_dalle_fixture[1], tmp_path_factory.mktemp("pretrained")
    folder = root / "dalle_bart_mini"
    folder.mkdir()
    for seed, side in enumerate(("encoder", "decoder"), start=1):
        state = {key: torch.zeros(shape) for key, shape in notes["small"][side].items()}
        seeded.fill(state, seed)
        torch.save(state, folder / f"{side}.pt")
    (folder / "vocab.json").write_text(json.dumps(notes["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *notes["merges"], ""]), encoding="utf-8")
    vqgan = VQGANConfig(
        ch=32, ch_mult=[1] * 5, num_res_blocks=1, attention_levels=[], z_channels=32, embed_dim=4, encoder=False
    )
    torch.manual_seed(0)
    state = VQGAN(vqgan).state_dict()
    state["embedding.weight"] = state.pop("codebook.weight")
    (root / "vqgan").mkdir()
    torch.save(state, root / "vqgan" / "detoker.pt")
    return root
