"""Small checkpoints in the formats of others."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn


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
