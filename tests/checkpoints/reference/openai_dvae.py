"""Record what OpenAI's package makes of seeded weights: codes, logits, pixels, pickled names, and keys at full size.

pip install --no-deps --target dall_e dall-e==0.1 attrs
PYTHONPATH=dall_e python tests/checkpoints/reference/openai_dvae.py
"""

import importlib.util
import io
import json
import pickletools
import sys
import types
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

SMALL = {
    "encoder": {"n_hid": 16, "n_blk_per_group": 2, "vocab_size": 64},
    "decoder": {"n_hid": 16, "n_init": 12, "n_blk_per_group": 2, "vocab_size": 64},
}


def load_seeded():
    """The script beside this one."""
    spec = importlib.util.spec_from_file_location("seeded", Path(__file__).with_name("seeded.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(part: str, **sizes: int) -> nn.Module:
    """OpenAI's encoder or decoder."""
    sys.modules.setdefault("requests", types.ModuleType("requests"))  # only its downloads want it
    from dall_e import Decoder, Encoder

    return {"encoder": Encoder, "decoder": Decoder}[part](**sizes).eval()


@torch.no_grad()
def fill(part: str, state: dict[str, Tensor]) -> None:
    """Seeded weights that make codes and pixels differ from place to place."""
    load_seeded().fill(state, seed=list(SMALL).index(part))
    if part == "encoder":
        for key in ("blocks.input.w", "blocks.output.conv.w"):  # what is alike everywhere adds to nothing
            state[key] -= state[key].mean(dim=(1, 2, 3), keepdim=True)
            state[key] *= 8
    else:
        state["blocks.input.w"] *= 8
        state["blocks.output.conv.w"] *= 2


def build_small() -> dict[str, nn.Module]:
    """Both, small, with seeded weights."""
    models = {part: build(part, **sizes) for part, sizes in SMALL.items()}
    for part, model in models.items():
        fill(part, model.state_dict())
    return models


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Shapes by key."""
    return {key: list(tensor.shape) for key, tensor in model.state_dict().items()}


def attributes_of(model: nn.Module) -> dict[str, int]:
    """The sizes that a module keeps, and its file therefore."""
    return {key: value for key, value in vars(model).items() if type(value) is int}


def names_in(model: nn.Module) -> list[str]:
    """What the pickle of a module names, modules and classes."""
    torch.save(model, file := io.BytesIO())
    with zipfile.ZipFile(file) as archive:
        pickle = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    return sorted({arg for code, arg, _ in pickletools.genops(pickle) if code.name == "GLOBAL"})


@torch.no_grad()
def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the fixture."""
    generator, seeded = torch.Generator().manual_seed(0), load_seeded()
    models = build_small()
    from dall_e import map_pixels, unmap_pixels

    tensors = {}
    for side in (32, 48):
        patches = torch.randint(256, (2, 3, side // 4, side // 4), generator=generator).byte()
        images = patches.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        logits = models["encoder"](map_pixels(images / 255))
        tokens = torch.randint(64, (2, side // 8, side // 8), generator=generator)
        maps = models["decoder"](F.one_hot(tokens, 64).permute(0, 3, 1, 2).float())
        tensors |= {
            f"{side}.images": images,
            f"{side}.codes": logits.argmax(dim=1).flatten(1).int(),
            f"{side}.tokens": tokens.flatten(1).int(),
            f"{side}.pixels": unmap_pixels(torch.sigmoid(maps[:, :3])),
        }
    tensors["48.logits"] = logits
    with torch.device("meta"):
        full = {part: shapes_of(build(part, device=torch.device("meta"))) for part in SMALL}
    metadata = {
        "small": {part: shapes_of(model) for part, model in models.items()},
        "full": full,
        "attributes": {part: attributes_of(model) for part, model in models.items()},
        "names": {part: names_in(model) for part, model in models.items()},
        "checksums": {part: seeded.checksum(model.state_dict()) for part, model in models.items()},
    }
    return tensors, {key: json.dumps(value) for key, value in metadata.items()}


if __name__ == "__main__":
    recorded, metadata = record()
    save_file(
        {key: tensor.contiguous() for key, tensor in recorded.items()},
        Path(__file__).with_suffix(".safetensors"),
        metadata=metadata,
    )
