"""What min-dalle's command ``image_from_text`` takes and does."""

import argparse
import io
import itertools
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dalle_pytorch.compat.min_dalle import MinDalle
from dalle_pytorch.compat.min_dalle_request import Request
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.backend import PRECISIONS

SHADES = " .:-=+*#%@"
"""From dark to light."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Of pictures that can be written."""
EXACT = {"bos_id": 16383, "norm_eps": 1e-5}
"""What min-dalle 0.4.11 takes."""


def parser() -> argparse.ArgumentParser:
    """The flags of min-dalle's image_from_text.py, and further ones."""
    flags = argparse.ArgumentParser(prog="image_from_text", description="Draw a text with DALL·E mini or mega.")
    flags.add_argument("--mega", action=argparse.BooleanOptionalAction, default=False, help="mega in place of mini")
    kind = flags.add_mutually_exclusive_group()
    kind.add_argument("--fp16", action="store_true", help="weights and arithmetic in 16 bits")
    kind.add_argument("--bf16", action="store_true", help="the same in bfloat16: fast on newer CPUs and GPUs")
    kind.add_argument("--exact", action="store_true", help="the tokens and pixels of min-dalle 0.4.11, in fp32")
    flags.add_argument("--precision", choices=PRECISIONS, help="of the decoder's arithmetic; int8 on a CPU only")
    flags.add_argument("--text", default="Dali painting of WALL·E", help="what to draw")
    flags.add_argument("--negative-text", default="", help="what to stay away from")
    flags.add_argument("--seed", type=int, default=-1, help="the same pictures for the same positive number")
    flags.add_argument("--grid-size", "--grid_size", type=int, default=1, help="rows and columns of pictures")
    flags.add_argument(
        "--image-path", "--image_path", type=Path, help="file, or an existing folder; the first free generated.png"
    )
    flags.add_argument("--overwrite", action="store_true", help="replace the file of --image-path")
    flags.add_argument("--models-root", "--models_root", default="pretrained", help="folder of the weights")
    flags.add_argument("--top_k", "--top-k", type=int, default=256, help="draw among so many likeliest tokens")
    flags.add_argument("--top-p", type=float, default=1.0, help="of these, the fewest with so much probability")
    flags.add_argument("--temperature", type=float, default=1.0, help="below 1: nearer to the likeliest")
    flags.add_argument("--supercondition-factor", type=float, default=16.0, help="guidance; 1 = off")
    flags.add_argument("--seamless", action="store_true", help="decode the grid as one picture")
    flags.add_argument("--device", default=None, help="cpu, cuda, ...; a GPU where there is one")
    return flags


def target(path: Path | None, *, overwrite: bool) -> Path:
    """The file to write: the one that is named, with .png where it has no suffix, or the first free name in a folder.

    Raises:
        UserError: no suffix of a picture, or it lies in a file.
        FileExistsError: it is there already.
    """
    if path is None or path.is_dir():
        names = (f"generated_{number}.png" if number else "generated.png" for number in itertools.count())
        return next(file for name in names if not (file := (path or Path()) / name).exists())
    if not path.suffix:
        path = path.with_name(f"{path.name}.png")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--image-path {path} is no picture; end it in one of {', '.join(SUFFIXES)}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another --image-path, or --overwrite it")
    if parents := [folder for folder in path.parents if folder.exists() and not folder.is_dir()]:
        raise UserError(f"--image-path {path} lies in {parents[0]}, which is a file")
    return path


def draw(flags: argparse.Namespace) -> Image.Image:
    """The picture that the flags ask for.

    Raises:
        UserError: flags that do not fit, or weights that cannot be read.
    """
    if flags.exact and flags.precision not in (None, "fp32"):
        raise UserError(f"--exact draws as min-dalle does, in fp32: leave --precision {flags.precision} out")
    dtype = torch.float16 if flags.fp16 else torch.bfloat16 if flags.bf16 else torch.float32
    options: dict[str, Any] = EXACT if flags.exact else {}
    call = {
        "text": flags.text,
        "seed": flags.seed,
        "grid_size": flags.grid_size,
        "is_seamless": flags.seamless,
        "temperature": flags.temperature,
        "top_k": flags.top_k,
        "top_p": flags.top_p,
        "supercondition_factor": flags.supercondition_factor,
        "negative_prompt": flags.negative_text,
    }
    Request.of(**call)  # refuses what cannot be drawn before the weights are read
    model = MinDalle(flags.models_root, dtype, flags.device, flags.mega, precision=flags.precision, **options)
    return model.generate_image(**call)


def encoded(image: Image.Image, suffix: str) -> bytes:
    """An image in the format that a suffix names."""
    file = io.BytesIO()
    image.save(file, format=Image.registered_extensions()[suffix.lower()])
    return file.getvalue()


def in_letters(image: Image.Image, columns: int = 72) -> str:
    """A picture as lines of letters, lighter ones for lighter places."""
    small = image.convert("L").resize((columns, columns // 2))  # a letter is twice as high as wide
    letters = [SHADES[value * len(SHADES) // 256] for value in small.tobytes()]
    return "\n".join("".join(letters[at : at + columns]) for at in range(0, len(letters), columns))
