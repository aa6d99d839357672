"""Record what taming-transformers and min-dalle make of seeded weights: codes, pixels, and all keys at full size.

Neither needs its dependencies for this; ``-P`` keeps this file from standing in for the package of its name:

    git clone https://github.com/CompVis/taming-transformers   # 3ba01b2
    pip install --no-deps --target min_dalle min-dalle==0.4.11
    PYTHONPATH=taming-transformers:min_dalle python -P tests/checkpoints/reference/taming.py
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SMALL = {
    "vq": {"ch_mult": (1, 2, 2), "num_res_blocks": 1, "attn_resolutions": [16], "z_channels": 16, "n_embed": 64},
    "gumbel": {"ch_mult": (1, 3), "num_res_blocks": 2, "attn_resolutions": [16], "z_channels": 8, "n_embed": 50},
    "depth": {"ch_mult": (2, 1), "num_res_blocks": 1, "attn_resolutions": [], "z_channels": 8, "n_embed": 20},
}
FULL = {
    "vq": {"ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": [16], "n_embed": 16384},
    "gumbel": {"ch_mult": (1, 1, 2, 4), "num_res_blocks": 2, "attn_resolutions": [32], "n_embed": 8192},
}


def load_seeded():
    """The script beside this one."""
    spec = importlib.util.spec_from_file_location("seeded", Path(__file__).with_name("seeded.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(kind: str, *, n_embed: int, z_channels: int = 256, embed_dim: int = 256, channels: int = 3, **sizes):
    """The parts of taming's VQModel or GumbelVQ; its own classes want Lightning and the losses."""
    from taming.modules.diffusionmodules.model import Decoder, Encoder
    from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2

    ends = {"in_channels": channels, "out_ch": channels, "z_channels": z_channels, "double_z": False}
    model = nn.Module()
    model.encoder, model.decoder = Encoder(**sizes, **ends), Decoder(**sizes, **ends)
    model.quant_conv = nn.Conv2d(z_channels, embed_dim, 1)
    model.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
    if kind == "gumbel":
        model.quantize = GumbelQuantize(z_channels, embed_dim, n_embed=n_embed)
    else:
        model.quantize = VectorQuantizer2(n_embed, embed_dim, beta=0.25)
    return model.eval()


def encode(model: nn.Module, images: Tensor) -> Tensor:
    """Codes of pictures in [0, 1], [b, h, w]; of a GumbelVQ without the noise that its forward always adds."""
    latents = model.quant_conv(model.encoder(2 * images - 1))
    if hasattr(model.quantize, "proj"):
        return model.quantize.proj(latents).argmax(dim=1)
    return model.quantize(latents)[2][2].view(len(images), *latents.shape[2:])


def decode(model: nn.Module, tokens: Tensor) -> Tensor:
    """Pixels of tokens [b, h, w], as the network gives them."""
    width = model.post_quant_conv.in_channels
    codes = model.quantize.get_codebook_entry(tokens.flatten(), (*tokens.shape, width))
    return model.decoder(model.post_quant_conv(codes))


def pixels(output: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return ((output + 1) / 2).clamp(0, 1)


def sizes_of(state: dict[str, Tensor]) -> dict[str, list[int]]:
    """Shapes, for a header."""
    return {key: list(tensor.shape) for key, tensor in state.items()}


@torch.no_grad()
def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the fixture."""
    seeded, generator = load_seeded(), torch.Generator().manual_seed(0)
    tensors, small, full, sums = {}, {}, {}, {}
    for kind, sizes in SMALL.items():
        channels = 1 if kind == "depth" else 3
        # a GumbelVQ puts its logits on codes, so that the two widths are one
        embed_dim = sizes["z_channels"] if kind == "gumbel" else 6
        model = build(kind, ch=32, resolution=32, embed_dim=embed_dim, channels=channels, **sizes)
        state = model.state_dict()
        seeded.fill(state)
        small[kind], sums[kind] = sizes_of(state), seeded.checksum(state)
        for side in (32, 48):
            images = torch.randint(256, (2, channels, side, side), generator=generator).byte()
            tokens = encode(model, images / 255)
            tensors |= {f"{kind}.{side}.images": images, f"{kind}.{side}.tokens": tokens.int()}
        tokens = torch.randint(sizes["n_embed"], (1, 4, 6), generator=generator)
        tensors |= {f"{kind}.grid.tokens": tokens.int(), f"{kind}.grid.images": pixels(decode(model, tokens))}
    with torch.device("meta"):
        for kind, sizes in FULL.items():
            full[kind] = sizes_of(build(kind, ch=128, resolution=256, **sizes).state_dict())
    tensors |= record_detoker(seeded, full)
    return tensors, {"small": json.dumps(small), "full": json.dumps(full), "checksums": json.dumps(sums)}


def record_detoker(seeded, full: dict[str, dict[str, list[int]]]) -> dict[str, Tensor]:
    """min-dalle's decoder has one size only; 2 x 2 tokens keep it quick, though its forward wants 16 x 16."""
    before = torch.is_grad_enabled(), torch.get_num_threads()
    from min_dalle.models.vqgan_detokenizer import VQGanDetokenizer

    torch.set_grad_enabled(before[0])  # the import switches gradients off and sets the threads
    torch.set_num_threads(before[1])
    model = VQGanDetokenizer().eval()
    state = model.state_dict()
    seeded.fill(state)
    full["detoker"] = sizes_of(state)
    tokens = torch.tensor([[[5, 16383], [0, 9000]]])
    codes = model.embedding(tokens).permute(0, 3, 1, 2)
    images = model.decoder(model.post_quant_conv(codes)).clip(0, 1)
    return {"detoker.tokens": tokens.int(), "detoker.images": images}


if __name__ == "__main__":
    recorded, metadata = record()
    save_file(
        {key: tensor.contiguous() for key, tensor in recorded.items()},
        Path(__file__).with_suffix(".safetensors"),
        metadata=metadata,
    )
