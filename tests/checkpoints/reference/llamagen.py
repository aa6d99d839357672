"""Record what LlamaGen's image tokenizer makes of seeded weights: codes, pixels, and all keys of VQ-16 and VQ-8.

git clone https://github.com/FoundationVision/LlamaGen   # ce98ec4
PYTHONPATH=LlamaGen python tests/checkpoints/reference/llamagen.py
"""

import importlib.util
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SMALL = {"ch_mult": [1, 2, 3], "z_channels": 16, "codebook_size": 96, "codebook_embed_dim": 8}


def load_seeded():
    """The script beside this one."""
    spec = importlib.util.spec_from_file_location("seeded", Path(__file__).with_name("seeded.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(*, ch_mult: list[int], z_channels: int, **codes: int) -> nn.Module:
    """LlamaGen's VQModel with 32 channels in place of 128, which its config has no word for."""
    from tokenizer.tokenizer_image.vq_model import Decoder, Encoder, ModelArgs, VQModel

    model = VQModel(ModelArgs(encoder_ch_mult=[1], decoder_ch_mult=[1], z_channels=z_channels, **codes))
    model.encoder = Encoder(ch=32, ch_mult=ch_mult, z_channels=z_channels)
    model.decoder = Decoder(ch=32, ch_mult=ch_mult, z_channels=z_channels)
    return model.eval()


def sizes_of(state: dict[str, Tensor]) -> dict[str, list[int]]:
    """Shapes, for a header."""
    return {key: list(tensor.shape) for key, tensor in state.items()}


@torch.no_grad()
def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the fixture."""
    from tokenizer.tokenizer_image.vq_model import VQ_models

    seeded, generator, tensors = load_seeded(), torch.Generator().manual_seed(0), {}
    model = build(**SMALL)
    state = model.state_dict()
    seeded.fill(state)
    for side in (32, 48):
        images = torch.randint(256, (2, 3, side, side), generator=generator).byte()
        tokens = model.encode(2 * (images / 255) - 1)[2][2].view(2, -1)
        tensors |= {f"{side}.images": images, f"{side}.tokens": tokens.int()}
    tokens = torch.randint(SMALL["codebook_size"], (1, 4, 6), generator=generator)
    output = model.decode_code(tokens.flatten(), (1, SMALL["codebook_embed_dim"], 4, 6))
    tensors |= {"grid.tokens": tokens.int(), "grid.images": ((output + 1) / 2).clamp(0, 1)}
    with torch.device("meta"):
        full = {name: sizes_of(make().state_dict()) for name, make in VQ_models.items()}
    metadata = {"small": sizes_of(state), "full": full, "checksum": seeded.checksum(state)}
    return tensors, {key: json.dumps(value) for key, value in metadata.items()}


if __name__ == "__main__":
    recorded, metadata = record()
    save_file(recorded, Path(__file__).with_suffix(".safetensors"), metadata=metadata)
