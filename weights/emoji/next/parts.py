"""The DALLE under way without what it carries, so that a state of it takes 18 MB in place of 49.

    python weights/emoji/next/parts.py split FULL.safetensors OWN.safetensors
    python weights/emoji/next/parts.py join OWN.safetensors VAE.safetensors ENCODER_FOLDER FULL.safetensors

``join`` puts image tokenizer and text encoder (``shrink_encoder.py``) back; ``train_dalle.py init=FULL`` then goes on.
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dalle_pytorch.checkpoints.text_encoder import load_text_encoder

CARRIED = ("vae.", "text_encoder.")


def read(file: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a file."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118 (it is no dict)


def main() -> None:
    """Split, or join."""
    if len(sys.argv) == 4 and sys.argv[1] == "split":
        tensors, header = read(sys.argv[2])
        save_file({name: each for name, each in tensors.items() if not name.startswith(CARRIED)}, sys.argv[3], header)
    elif len(sys.argv) == 6 and sys.argv[1] == "join":
        (tensors, header), (vae, _) = read(sys.argv[2]), read(sys.argv[3])
        encoder, _ = load_text_encoder(Path(sys.argv[4]))
        tensors |= {f"vae.{name}": each for name, each in vae.items()}
        tensors |= {f"text_encoder.{name}": each.half() for name, each in encoder.state_dict().items()}
        save_file(tensors, sys.argv[5], header)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
