"""The table of foreign formats: how each is told from the others, and what reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from dalle_pytorch.header import Header, State
from dalle_pytorch.importers import (
    dalle_mini,
    dalle_pytorch,
    llamagen,
    min_dalle,
    mindalle,
    open_clip,
    openai_clip,
    openai_dvae,
    taming,
    transformers_clip,
)
from dalle_pytorch.importers.reader import read, state_dict

PARTS = ("state_dict", "model", "weights", "ema", "module")
"""Where a checkpoint that holds more keeps its weights."""


class Source(NamedTuple):
    """A foreign format."""

    what: str
    convert: Callable[..., tuple[Header, State]]
    files: tuple[tuple[str, ...], ...] = ()
    """Files that a folder of this format has; one of the sets."""
    signatures: tuple[frozenset[str], ...] = ()
    """Weights that a file of this format has; one of the sets."""


SOURCES: dict[str, Source] = {
    "openai_dvae": Source(
        "OpenAI's dVAE: folder of encoder.pkl and decoder.pkl",
        openai_dvae.convert,
        files=(openai_dvae.FILES,),
        signatures=(openai_dvae.SIGNATURE,),
    ),
    "taming": Source(
        "VQGAN of taming-transformers (VQModel, GumbelVQ): .ckpt",
        taming.convert,
        signatures=(taming.SIGNATURE, taming.GUMBEL_SIGNATURE),
    ),
    "llamagen": Source(
        "image tokenizer of LlamaGen (VQ-16, VQ-8): .pt", llamagen.convert, signatures=(llamagen.SIGNATURE,)
    ),
    "min_dalle": Source(
        "DALL·E mini and mega of min-dalle: folder of .pt files", min_dalle.convert, files=min_dalle.FILES
    ),
    "dalle_mini": Source(
        "DALL·E mini and mega of dalle-mini: folder with flax_model.msgpack", dalle_mini.convert, files=dalle_mini.FILES
    ),
    "dalle_pytorch": Source(
        "DALLE-pytorch 1.6.6: vae.pt, dalle.pt",
        dalle_pytorch.convert,
        signatures=(dalle_pytorch.VAE_SIGNATURE, dalle_pytorch.SIGNATURE, dalle_pytorch.REVERSIBLE_SIGNATURE),
    ),
    "mindalle": Source("minDALL-E of Kakao Brain: folder", mindalle.convert, files=(mindalle.FILES,)),
    "openai_clip": Source(
        "CLIP of OpenAI: .pt (TorchScript archive)", openai_clip.convert, signatures=(openai_clip.SIGNATURE,)
    ),
    "open_clip": Source(
        "CLIP or SigLIP of open_clip: folder with open_clip_config.json",
        open_clip.convert,
        files=(open_clip.FILES,),
        signatures=(open_clip.SIGNATURE,),
    ),
    "transformers_clip": Source(
        "CLIP or SigLIP of transformers: folder", transformers_clip.convert, files=(transformers_clip.FILES,)
    ),
}


def find(path: Path) -> str:
    """The name of the format of a file or folder; of a folder that holds several the first of the table.

    Raises:
        ValueError: none fits, or a file could be of several; names them.
    """
    if path.is_dir():
        names = [name for name, row in SOURCES.items() if any(_all_there(path, files) for files in row.files)][:1]
    else:
        keys = weights(read(path)).keys()
        names = [name for name, row in SOURCES.items() if any(part <= keys for part in row.signatures)]
    if len(names) != 1:
        found = f"could be {' or '.join(names)}" if names else "is of no known format"
        raise ValueError(f"{path} {found}; say which with source=, one of {', '.join(SOURCES)}")
    return names[0]


def convert(path: Path, source: str | None = None, **options: Any) -> tuple[Header, State]:
    """Header and weights of a foreign file or folder.

    Args:
        path: the file or folder.
        source: a name of SOURCES; None = found from what is there.
        **options: what this source's ``convert`` takes.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: an unknown source or option, or content that does not fit; names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    name = source or find(path)
    if name not in SOURCES:
        raise ValueError(f"source {name!r} is not one of {', '.join(SOURCES)}")
    hints = get_type_hints(SOURCES[name].convert)
    for option, value in options.items():
        if isinstance(value, str) and Path in get_args(hints.get(option)):
            options[option] = Path(value)
    try:
        return SOURCES[name].convert(path, **options)
    except TypeError as error:
        if "keyword argument" in str(error):
            raise ValueError(f"source {name}: {error}") from error
        raise


def weights(content: Any) -> State:
    """The weights of a checkpoint that may hold more, under their own names."""
    if isinstance(content, dict):
        content = next((content[part] for part in PARTS if isinstance(content.get(part), dict)), content)
    return state_dict(content)


def _all_there(folder: Path, files: tuple[str, ...]) -> bool:
    return all(any(folder.glob(file)) for file in files)
