"""Record what torch-fidelity's Inception gives for seeded weights.

``pip install --no-deps --target PEERS torch-fidelity==0.4.0``, then
``PYTHONPATH=.:PEERS python tests/evaluation/reference/inception.py`` in the root of this repository.
"""

import importlib.util
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
NAMES = ("2048", "logits_unbiased")


def seeded():
    """The module that fills weights."""
    path = HERE.parents[1] / "importers" / "reference" / "seeded.py"
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


def record() -> dict[str, Tensor]:
    """Features and class scores of the picture."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    blank = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    keys: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        # the constructor loads a file: give it one that says what it wants, then one with weights
        path = Path(folder) / "weights.pth"
        load = FeatureExtractorInceptionV3.load_state_dict
        FeatureExtractorInceptionV3.load_state_dict = lambda self, _: keys.update(self.state_dict())
        torch.save({}, path)
        FeatureExtractorInceptionV3("inception", list(NAMES), str(path))
        FeatureExtractorInceptionV3.load_state_dict = load
        del blank
        fill(keys)
        torch.save(keys, path)
        net = FeatureExtractorInceptionV3("inception", list(NAMES), str(path))
        with torch.no_grad():
            return dict(zip(("features", "logits"), net(picture()), strict=True)), keys


def main() -> None:
    """Write ``inception.safetensors``."""
    outputs, keys = record()
    names = "\n".join(f"{key} {tuple(tensor.shape)}" for key, tensor in sorted(keys.items()))
    metadata = {"checksum": seeded().checksum(keys), "keys": names}
    save_file(outputs, HERE / "inception.safetensors", metadata=metadata)


if __name__ == "__main__":
    main()
