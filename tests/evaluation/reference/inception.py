"""Record what torch-fidelity's Inception gives for seeded weights.

``pip install --no-deps --target PEERS torch-fidelity==0.4.0``, then
``PYTHONPATH=.:PEERS python tests/evaluation/reference/inception.py`` in the root of this repository.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
NAMES = ("2048", "logits_unbiased")


def seeded():
    """The module that fills weights."""
    path = HERE.parents[1] / "checkpoints" / "reference" / "seeded.py"
    spec = importlib.util.spec_from_file_location("seeded", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fill(state: dict[str, Tensor]) -> None:
    """Seeded weights; variances about 1, and the He factor that keeps activations from dying out."""
    seeded().fill(state, 0)
    for key, tensor in state.items():
        if key.endswith("running_var"):
            tensor.abs_().add_(1)
        elif key.endswith("conv.weight"):
            tensor.mul_(2**0.5)


def picture() -> Tensor:
    """A picture of 299 x 299 of whole numbers in 0 to 255, without random ones."""
    y, x, c = torch.meshgrid(torch.arange(299), torch.arange(299), torch.arange(3), indexing="ij")
    return ((x * (c + 3) + y * y // 7 + x * y // (50 + 10 * c)) % 256).permute(2, 0, 1)[None].to(torch.uint8)


def record() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features and class scores of the picture, and the weights."""
    package = ModuleType("torch_fidelity")  # its __init__ imports torchvision, which the Inception does not need
    package.__path__ = importlib.util.find_spec("torch_fidelity").submodule_search_locations
    sys.modules["torch_fidelity"] = package
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    weights: dict[str, Tensor] = {}

    class Seeded(FeatureExtractorInceptionV3):
        """Loads seeded weights in place of those of the file."""

        def load_state_dict(self, _: object) -> None:
            fill(self.state_dict())
            weights.update(self.state_dict())

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({}, file.name)  # a path is needed, or it would download
        net = Seeded("inception", list(NAMES), file.name)
    with torch.no_grad():
        return dict(zip(("features", "logits"), net(picture()), strict=True)), weights


def main() -> None:
    """Write ``inception.safetensors``."""
    outputs, weights = record()
    names = "\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(weights.items()))
    metadata = {"checksum": seeded().checksum(weights), "keys": names}
    save_file(outputs, HERE / "inception.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
