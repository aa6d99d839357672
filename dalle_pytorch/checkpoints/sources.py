"""The table of foreign formats: how each is told from the others, and what reads it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from dalle_pytorch.checkpoints.checkpoint import Header, State
from dalle_pytorch.checkpoints.importers import flax_dalle_mini as dalle_mini
from dalle_pytorch.checkpoints.importers import kakao_mindalle as mindalle
from dalle_pytorch.checkpoints.importers import llamagen, open_clip, openai_clip, openai_dvae, taming, transformers_clip
from dalle_pytorch.checkpoints.importers import lucidrains_dalle as dalle_pytorch
from dalle_pytorch.checkpoints.importers import torch_min_dalle as min_dalle
from dalle_pytorch.checkpoints.reader import read, weights_of
from dalle_pytorch.errors import UserError, first_line
from dalle_pytorch.files import read_json


class Source(NamedTuple):
    """A foreign format."""

    what: str
    convert: Callable[..., tuple[Header, State]]
    files: tuple[tuple[str, ...], ...] = ()
    """Files that a folder of this format has; one of the sets."""
    signatures: tuple[frozenset[str], ...] = ()
    """Weights that a file of this format has; one of the sets."""
    model_types: tuple[str, ...] = ()
    """What a folder's config.json calls the model, if it says; any where empty."""


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
        "DALL·E mini and mega of dalle-mini: folder with flax_model.msgpack",
        dalle_mini.convert,
        files=dalle_mini.FILES,
        model_types=("dallebart",),
    ),
    "dalle_pytorch": Source(
        "DALLE-pytorch 1.6.6: vae.pt, dalle.pt, folder of DeepSpeed",
        dalle_pytorch.convert,
        files=(dalle_pytorch.DEEPSPEED,),
        signatures=(dalle_pytorch.VAE_SIGNATURE, dalle_pytorch.SIGNATURE, dalle_pytorch.REVERSIBLE_SIGNATURE),
    ),
    "mindalle": Source("minDALL-E of Kakao Brain: folder", mindalle.convert, files=(mindalle.FILES,)),
    "openai_clip": Source(
        "CLIP of OpenAI: .pt (TorchScript archive)",
        openai_clip.convert,
        signatures=(openai_clip.SIGNATURE, openai_clip.PLAIN_SIGNATURE),
    ),
    "open_clip": Source(
        "CLIP or SigLIP of open_clip: folder with open_clip_config.json",
        open_clip.convert,
        files=(open_clip.FILES,),
        signatures=(open_clip.SIGNATURE, openai_clip.PLAIN_SIGNATURE),
    ),
    "transformers_clip": Source(
        "CLIP or SigLIP of transformers: folder",
        transformers_clip.convert,
        files=(transformers_clip.FILES,),
        model_types=tuple(transformers_clip.HABITS),
    ),
}


OWN_NAMES = frozenset({"image_emb.weight", "image_head.weight"})
"""Weights of a DALLE of ours, whose settings are in no weights."""
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Values of options, and how JSON spells them."""


def find(path: Path) -> str:
    """The name of the format of a file or folder; of a folder that holds several the first of the table.

    Of a file the most weights that a format is known by count: an archive of OpenAI's has the names of its state dict,
    and some more.

    Raises:
        UserError: none fits, or a file could be of several; names them.
    """
    if path.is_dir():
        said = read_json(path / "config.json").get("model_type") if (path / "config.json").is_file() else None
        rows = {name: row for name, row in SOURCES.items() if said is None or said in (row.model_types or (said,))}
        names = [name for name, row in rows.items() if any(_all_there(path, files) for files in row.files)][:1]
        keys = frozenset()
    else:
        content = read(path)
        if dalle_pytorch.is_deepspeed(content):
            return "dalle_pytorch"
        keys = weights_of(content).keys()
        found = {name: max((len(part) for part in row.signatures if part <= keys), default=0)
                 for name, row in SOURCES.items()}  # fmt: skip
        names = [name for name, count in found.items() if count and count == max(found.values())]
    if len(names) != 1:
        guess = f"could be {' or '.join(names)}" if names else "is of no known format"
        if keys >= OWN_NAMES:
            raise UserError(
                f"{path} holds weights of ours without their settings: save the model with dalle_pytorch.save"
            )
        raise UserError(
            f"{path} {guess}; say which with source= of load(), or with dalle-import-weights SOURCE {path} --out "
            f"FILE.safetensors; sources are {', '.join(SOURCES)}"
        )
    return names[0]


def convert(path: Path, source: str | None = None, /, **options: Any) -> tuple[Header, State]:
    """Header and weights of a foreign file or folder.

    Args:
        path: the file or folder.
        source: a name of SOURCES; None = found from what is there.
        **options: what this source's ``convert`` takes.

    Raises:
        FileNotFoundError: nothing there.
        UserError: an unknown source or option, an option of another type, or content that does not fit; names it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}")
    name = source or find(path)
    if name not in SOURCES:
        raise UserError(f"source {name!r} is not one of {', '.join(SOURCES)}")
    checked = {option: _checked(name, option, value) for option, value in options.items()}
    try:
        return SOURCES[name].convert(path, **checked)
    except (TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} does not have the form of {name}, {SOURCES[name].what} ({reason})") from error


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Options of a source as a command line has them, ``name=value``.

    Values are read as JSON or Python words (numbers, true, None), anything else is text.

    Raises:
        UserError: no ``=`` in a word, or a name that is no option of a source; names it.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise UserError(f"{word!r} is not name=value")
        if name in ("weights", "kind", "source", "map_location", "dtype"):  # arguments of ``load`` itself
            raise UserError(f"{name} is no option of a source")
        try:
            options[name] = json.loads(PYTHON_WORDS.get(value, value))
        except json.JSONDecodeError:
            options[name] = value
    return options


def _checked(source: str, option: str, value: Any) -> Any:
    """The value of an option as the source's ``convert`` takes it."""
    hints = get_type_hints(SOURCES[source].convert)
    known = {name: get_args(hint) or (hint,) for name, hint in hints.items() if name not in ("path", "return")}
    if option not in known:
        raise UserError(f"source {source}: it takes no {option}, only {', '.join(known) or 'the path'}")
    kinds = known[option]
    if isinstance(value, str) and str not in kinds and Path in kinds:
        return Path(value)
    if type(value) is int and int not in kinds and float in kinds:
        return float(value)
    if type(value) not in kinds and not (isinstance(value, Path) and Path in kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UserError(f"source {source}: {option}={value!r} is no {expected}")
    return value


def _all_there(folder: Path, files: tuple[str, ...]) -> bool:
    return all(any(folder.glob(file)) for file in files)
