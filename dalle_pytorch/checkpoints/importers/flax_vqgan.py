"""The VQGAN that DALL·E mini draws with: in Flax, in torch, or min-dalle's decoder of it.

Source: github.com/patil-suraj/vqgan-jax, vqgan_jax/.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from dalle_pytorch.checkpoints import flax_reader
from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers import taming
from dalle_pytorch.checkpoints.reader import read, state_dict
from dalle_pytorch.errors import refuse
from dalle_pytorch.files import read_json

VQGAN_NAMES = {
    r"\b(down|up)_(\d+)\.": r"\1.\2.",
    r"(\d)\.(block|attn)_(\d+)\.": r"\1.\2.\3.",
    r"(kernel|scale|embedding)$": "weight",
}
"""Flax's names of parts, and taming's."""
VQGAN_FIXED = {"double_z": False, "give_pre_end": False, "resamp_with_conv": True}


def convert_vqgan(path: Path, *, norm_eps: float) -> tuple[Header, State]:
    """The VQGAN that dalle-mini draws with, which was trained on pixels in [0, 1].

    Args:
        path: its folder in Flax, its checkpoint in torch, or min-dalle's ``detoker.pt``.
        norm_eps: of its norms.

    Raises:
        ValueError: nothing of the kind; names file and culprit.
    """
    if not path.exists():
        refuse(
            path,
            "no VQGAN here: vqgan= names its folder (dalle-mini/vqgan_imagenet_f16_16384) or min-dalle's detoker.pt",
        )
    if path.is_file():
        if state_dict(read(path)).keys() >= taming.DETOKER_SIGNATURE:
            return taming.convert_detoker(path, norm_eps=norm_eps)
        return taming.convert(path, pixel_range="zero_to_one", norm_eps=norm_eps)
    settings = read_json(path / "config.json")
    for name, ours in VQGAN_FIXED.items():
        if settings.get(name, ours) != ours:
            refuse(path / "config.json", f"{name} is {settings[name]!r}; only {ours!r} can be imported")
    source = path / "flax_model.msgpack"
    arrays, state = flax_reader.read(source), {}
    for key in list(arrays):
        tensor = arrays.pop(key).read()
        # [h, w, in, out] of a convolution
        state[rename_parts(key, VQGAN_NAMES)] = tensor.permute(3, 2, 0, 1).contiguous() if tensor.ndim == 4 else tensor
    try:
        config, weights = taming.vqgan_from_state(
            state, pixel_range="zero_to_one", norm_eps=norm_eps, image_size=settings.get("resolution", 256)
        )
    except ValueError as error:
        refuse(source, str(error))
    return make_header(config), weights


def rename_parts(key: str, names: Mapping[str, str]) -> str:
    """A key with all that fits a row replaced."""
    for pattern, replacement in names.items():
        key = re.sub(pattern, replacement, key)
    return key
