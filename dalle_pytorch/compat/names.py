"""Names of DALLE-pytorch that the package answers to beside its own, and those that have a successor here."""

import importlib.metadata
from typing import Any

SUCCESSORS = {
    "VQGanVAE1024": "VQGanVAE()",
    "distributed_utils": "trainer.devices= and trainer.strategy= of train_dalle.py (docs/training.md)",
    "TextImageDataset": "prepare_data.py source=folder, and dalle_pytorch.data.datamodule.TextImageDataModule",
}
"""What took the place of a name, for the error that names it."""


def missing(module: str, name: str) -> Exception:
    """The error for a name that a module does not have.

    An AttributeError; for a name of SUCCESSORS an ImportError, since ``from ... import`` would drop the message of the
    first.
    """
    if name in SUCCESSORS:
        return ImportError(f"{module}.{name} of DALLE-pytorch is not here; its place took {SUCCESSORS[name]}")
    return AttributeError(f"module {module!r} has no attribute {name!r}")


def package_attribute(name: str) -> Any:
    """``__version__``, which is read when it is asked for.

    Raises:
        AttributeError: no such name.
        ImportError: a name of SUCCESSORS; names what took its place.
    """
    if name != "__version__":
        raise missing("dalle_pytorch", name)
    return importlib.metadata.version("dalle-pytorch-lab")
