"""Seeded weights, and the outputs that reference implementations gave for them."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig

REFERENCE = Path(__file__).parent / "reference"


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


@pytest.fixture(scope="session")
def min_dalle_files(min_dalle_folder):
    """Write the small files of the hub's kuprel/min-dalle; the names of mini's end in _mini."""

    def write(folder: Path, *, weights=False) -> Path:
        folder.mkdir(exist_ok=True)
        source = min_dalle_folder / "dalle_bart_mini"
        names = {"vocab.json", "merges.txt", *(("encoder.pt", "decoder.pt") if weights else ())}
        for name in names:
            (folder / name).write_bytes((source / name).read_bytes())
            (folder / name.replace(".", "_mini.")).write_bytes((source / name).read_bytes())
        (folder / "detoker.pt").write_bytes((min_dalle_folder / "vqgan/detoker.pt").read_bytes())
        return folder

    return write


class Plain(nn.Module):
    """A module with nothing but what is put into it."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(scope="session")
def archive() -> Callable[[Mapping[str, Tensor], Path], None]:
    """Write a TorchScript archive of modules that hold a state dict under its names."""

    def write(state: Mapping[str, Tensor], path: Path) -> None:
        root = Plain()
        for key, tensor in state.items():
            module: nn.Module = root
            *parents, last = key.split(".")
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, Plain())
                module = module._modules[parent]
            module.register_buffer(last, tensor)
        torch.jit.save(torch.jit.trace(root, torch.zeros(1)), path)

    return write
