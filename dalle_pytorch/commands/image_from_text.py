"""min-dalle's command: ``image_from_text --text "a red apple" --no-mega``; prints the picture in letters as well."""

import argparse
import logging
import sys
from pathlib import Path

import torch
from PIL import Image

from dalle_pytorch.config import USER_ERRORS
from dalle_pytorch.min_dalle import MinDalle

SHADES = " .:-=+*#%@"
"""From dark to light."""


def parser() -> argparse.ArgumentParser:
    """The flags of min-dalle's image_from_text.py, and further ones."""
    flags = argparse.ArgumentParser(prog="image_from_text", description="Draw a text with DALL·E mini or mega.")
    flags.add_argument("--mega", action=argparse.BooleanOptionalAction, default=False, help="mega in place of mini")
    flags.add_argument("--fp16", action="store_true", help="weights and arithmetic in 16 bits")
    flags.add_argument("--bf16", action="store_true", help="the same in bfloat16: fast on newer CPUs and GPUs")
    flags.add_argument("--text", default="Dali painting of WALL·E", help="what to draw")
    flags.add_argument("--negative-text", default="", help="what to stay away from")
    flags.add_argument("--seed", type=int, default=-1, help="the same pictures for the same positive number")
    flags.add_argument("--grid-size", "--grid_size", type=int, default=1, help="rows and columns of pictures")
    flags.add_argument("--image-path", "--image_path", type=Path, default=Path("generated"), help="file, or its stem")
    flags.add_argument("--models-root", "--models_root", default="pretrained", help="folder of the weights")
    flags.add_argument("--top_k", "--top-k", type=int, default=256, help="draw among so many likeliest tokens")
    flags.add_argument("--top-p", type=float, default=1.0, help="of these, the fewest with so much probability")
    flags.add_argument("--temperature", type=float, default=1.0, help="below 1: nearer to the likeliest")
    flags.add_argument("--supercondition-factor", type=float, default=16.0, help="guidance; 1 = off")
    flags.add_argument("--seamless", action="store_true", help="decode the grid as one picture")
    flags.add_argument("--device", default=None, help="cpu, cuda, ...; a GPU where there is one")
    return flags


def main() -> None:
    """Draw and save; errors in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flags = parser().parse_args()
    path = flags.image_path if flags.image_path.suffix else flags.image_path.with_suffix(".png")
    try:
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another --image-path")
        dtype = torch.float16 if flags.fp16 else torch.bfloat16 if flags.bf16 else torch.float32
        model = MinDalle(flags.models_root, dtype, flags.device, flags.mega)
        image = model.generate_image(
            flags.text,
            flags.seed,
            flags.grid_size,
            is_seamless=flags.seamless,
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            supercondition_factor=flags.supercondition_factor,
            negative_prompt=flags.negative_text,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    print(in_letters(image))
    print(path)


def in_letters(image: Image.Image, columns: int = 72) -> str:
    """A picture as lines of letters, lighter ones for lighter places."""
    small = image.convert("L").resize((columns, columns // 2))  # a letter is twice as high as wide
    letters = [SHADES[value * len(SHADES) // 256] for value in small.tobytes()]
    return "\n".join("".join(letters[at : at + columns]) for at in range(0, len(letters), columns))


if __name__ == "__main__":
    main()
