"""Loading needs little more memory than the weights themselves, whatever the file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig


def write_min_dalle(folder: Path) -> None:
    """min-dalle's files of about 150 M parameters in fp16."""
    dim, ffn, layers = 1024, 4096, 3
    for side, rows, positions in (("encoder", 300, 64), ("decoder", 16_385, 256)):
        shapes = {
            "embed_tokens.weight": (rows, dim),
            "embed_positions.weight": (positions, dim),
            "final_ln.bias": (dim,),
        }
        shapes |= {f"layernorm_embedding.{name}": (dim,) for name in ("weight", "bias")}
        shapes |= {"lm_head.weight": (rows, dim)} if side == "decoder" else {}
        for layer in range(layers):
            for part in ("self", "encoder") if side == "decoder" else ("self",):
                names = [f"{part}_attn.{name}_proj.weight" for name in "qkv"] + [f"{part}_attn.out_proj.weight"]
                shapes |= {f"layers.{layer}.{name}": (dim, dim) for name in names}
                names = [
                    f"pre_{part}_attn_layer_norm.bias",
                    *(f"{part}_attn_layer_norm.{n}" for n in ("weight", "bias")),
                ]
                shapes |= {f"layers.{layer}.{name}": (dim,) for name in names}
            glu = {"ln0.bias": (dim,), "ln1.bias": (ffn,)}
            glu |= {"fc0.weight": (ffn, dim), "fc1.weight": (ffn, dim), "fc2.weight": (dim, ffn)}
            shapes |= {f"layers.{layer}.glu.{name}": shape for name, shape in glu.items()}
        torch.save({name: torch.zeros(shape).half() for name, shape in shapes.items()}, folder / f"{side}_mini.pt")


@pytest.mark.parametrize(
    ("what", "dtype"),
    [
        ("taming", torch.float32),
        ("taming", torch.float16),
        ("ours", torch.float16),
        ("min_dalle", None),
        ("pretrained_vaes", torch.float16),
    ],
)
def test_loading_needs_little_more_memory_than_the_weights(what, dtype, tmp_path, min_dalle_files):
    """Peak of a process that loads weights, beyond what it needs without them: a VQGAN of 76 M parameters, a DALL·E."""
    path = tmp_path / "last.ckpt"
    if what == "min_dalle":
        path = min_dalle_files(tmp_path)
        write_min_dalle(path)
    elif what == "ours":
        path = tmp_path / "vqgan.safetensors"
        checkpoint.save(VQGAN(VQGANConfig()).half(), path)
    else:
        state = VQGAN(VQGANConfig()).state_dict()
        state["quantize.embedding.weight"] = state.pop("codebook.weight")
        torch.save({"state_dict": {key: value.to(dtype) for key, value in state.items()}}, path)
    call = f"dalle_pytorch.load(path, dtype={'None' if dtype is None else 'torch.float32'})"
    code = f"""
import sys, torch, dalle_pytorch
from dalle_pytorch.compat.pretrained_vaes import VQGanVAE
path = sys.argv[1]
def peak():  # kB; getrusage would count the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
model = {"VQGanVAE(path)" if what == "pretrained_vaes" else call}
touched = sum(p.sum() for p in model.parameters())
weights = sum(p.nbytes for p in model.parameters()) / 1024
print((peak() - before) / weights)
"""
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert 0.9 < float(result.stdout) < 1.15
