"""Record what DALLE-pytorch 1.6.6 makes of seeded weights: logits, greedy tokens, codes and pixels, for each option.

``benchmarks/peer.py`` says how to make an interpreter that has it; ``-P`` keeps this file from standing in for it:

    peer/bin/python -P tests/checkpoints/reference/dalle_pytorch.py [file to write]
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

VAES = {
    "plain": {"image_size": 16, "num_layers": 2, "num_resnet_blocks": 0, "channels": 3},
    "blocks": {"image_size": 16, "num_layers": 1, "num_resnet_blocks": 2, "channels": 3},
    "rgba": {"image_size": 16, "num_layers": 3, "num_resnet_blocks": 1, "channels": 4},
}
VAE_SIZES = {"num_tokens": 24, "codebook_dim": 12, "hidden_dim": 8}
DALLE_VAE = {"image_size": 32, "num_layers": 2, "num_tokens": 10, "codebook_dim": 8, "hidden_dim": 8, "channels": 3,
             "num_resnet_blocks": 1}  # fmt: skip
SIZES = {"dim": 32, "depth": 2, "heads": 2, "dim_head": 20, "num_text_tokens": 20, "text_seq_len": 6}
PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
CASES = {
    "defaults": {},
    "bare": {"rotary_emb": False, "shift_tokens": False},
    "rotary": {"shift_tokens": False, "dim_head": 32},
    "shift": {"rotary_emb": False},
    "sandwich": {"sandwich_norm": True, "rotary_emb": False},
    "stable": {"stable": True},
    "reversible": {"reversible": True},
    "reversible_bare": {"reversible": True, "rotary_emb": False, "shift_tokens": False},
    "tied": {"share_input_output_emb": True},
    "shared": {"shared_attn_ids": ("0", "1"), "shared_ff_ids": ("0",), "depth": 3},
    "patterns": {"attn_types": PATTERNS, "depth": 4},
    "static_masks": {"attn_types": PATTERNS, "depth": 4, "optimize_for_inference": True, "shift_tokens": False},
    "all": {"attn_types": PATTERNS, "depth": 4, "reversible": True, "stable": True, "sandwich_norm": True,
            "share_input_output_emb": True, "shared_ff_ids": (0, 1), "attn_dropout": 0.1, "ff_dropout": 0.1},
}  # fmt: skip


def load_script(path: Path):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(model, seeded) -> dict:
    """Fills a model's weights; shapes of its state, which names mean the same weight, and a checksum."""
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "transformer.pos_emb"}
    first: dict[int, str] = {}
    aliases = {key: first.setdefault(tensor.data_ptr(), key) for key, tensor in state.items()}
    seeded.fill({key: state[key] for key in first.values()})
    shapes = {key: list(tensor.shape) for key, tensor in state.items()}
    return {
        "shapes": shapes,
        "aliases": {key: name for key, name in aliases.items() if key != name},
        "checksum": seeded.checksum(state),
    }


def greedy(dalle, text: Tensor) -> Tensor:
    """Likeliest tokens, each from the whole sequence before it: its cache is dead."""
    tokens = text.new_empty(len(text), 0)
    for _ in range(dalle.image_seq_len):
        scores = dalle(text.clone(), tokens)[:, -1, dalle.num_text_tokens :]
        tokens = torch.cat([tokens, scores.argmax(dim=-1, keepdim=True)], dim=1)
    return tokens


@torch.no_grad()
def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the fixture."""
    here = Path(__file__).parent
    load_script(here.parents[2] / "benchmarks" / "peer.py")
    from dalle_pytorch import DALLE, DiscreteVAE

    seeded, generator = load_script(here / "seeded.py"), torch.Generator().manual_seed(0)
    tensors, vaes, dalles = {}, {}, {}
    for name, sizes in VAES.items():
        hparams = {**sizes, **VAE_SIZES}
        vae = DiscreteVAE(**hparams).eval()
        vaes[name] = {"hparams": hparams, **describe(vae, seeded)}
        images = torch.randint(256, (2, sizes["channels"], 16, 16), generator=generator).byte()
        tokens = vae.get_codebook_indices(images / 255)
        tensors |= {f"vae.{name}.images": images, f"vae.{name}.tokens": tokens.byte()}
        tensors[f"vae.{name}.decoded"] = vae.decode(tokens[:1])
    text = torch.tensor([[3, 19, 4, 0, 0, 0], [1, 5, 0, 7, 9, 2]])
    images = torch.randint(256, (2, 3, 32, 32), generator=generator).byte()
    tensors |= {"text": text.byte(), "images": images}
    for name, options in CASES.items():
        hparams = {**SIZES, **options}
        dalle = DALLE(vae=DiscreteVAE(**DALLE_VAE), **hparams).eval()
        dalles[name] = {"hparams": hparams, "vae_params": DALLE_VAE, **describe(dalle, seeded)}
        logits = dalle(text.clone(), images / 255)
        tensors[f"{name}.text"] = logits[:, : dalle.text_seq_len, : dalle.num_text_tokens]
        tensors[f"{name}.image"] = logits[:, dalle.text_seq_len :, dalle.num_text_tokens :]
        tensors[f"{name}.greedy"] = greedy(dalle, text).byte()
        if dalle.transformer.pos_emb is not None:
            tensors[f"angles.{hparams['dim_head']}"] = dalle.transformer.pos_emb
    return tensors, {"vaes": json.dumps(vaes), "dalles": json.dumps(dalles)}


if __name__ == "__main__":
    recorded, metadata = record()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".safetensors")
    save_file({key: tensor.contiguous() for key, tensor in recorded.items()}, target, metadata=metadata)
