"""Scripts that hold fixed pictures and the numbers others found for them."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

REFERENCE = Path(__file__).parent / "reference"


def load_script(path: Path) -> ModuleType:
    """A file as a module."""
    spec = importlib.util.spec_from_file_location(f"reference_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def classical() -> ModuleType:
    """``reference/classical.py``: fixed pictures and features."""
    return load_script(REFERENCE / "classical.py")


@pytest.fixture(scope="session")
def evaluation_script() -> Callable[[str], ModuleType]:
    """A script of the reference folder, by name."""
    return lambda name: load_script(REFERENCE / f"{name}.py")


@pytest.fixture
def generator() -> torch.Generator:
    """A source of randomness of its own."""
    return torch.Generator().manual_seed(3)
