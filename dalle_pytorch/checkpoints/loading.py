"""``dalle_pytorch.load``: a model from our file, from somebody else's, or from the hub."""

import importlib
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dalle_pytorch.checkpoints import checkpoint, hub, sources
from dalle_pytorch.checkpoints.checkpoint import Header, State, role
from dalle_pytorch.checkpoints.reader import mmap_scope, release
from dalle_pytorch.errors import UserError


def load(
    weights: str | Path,
    *,
    kind: str | None = None,
    source: str | None = None,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> Any:
    """A model, ready to use. Nothing in a file is executed.

    Args:
        weights: a checkpoint of ours (file or folder), a file or folder of another program's, a name of
            ``checkpoints.hub.RELEASES`` ("emoji" = the weights that come along), or an id of the Hugging Face hub.
        kind: "vae" (any image tokenizer), "dalle", "clip" or "probe" if nothing else will do; None = any. Of "emoji" it
            says which is meant; None = its DALLE.
        source: the format of a foreign file, a name of ``checkpoints.sources.SOURCES``; None = found from its content.
        map_location: device of the weights.
        dtype: of the weights; None = as they are stored.
        **options: what the importer of this source takes beyond the path.

    Returns:
        The model in eval mode, with its tokenizers.

    Raises:
        FileNotFoundError: no such file, name or id.
        UserError: it cannot be read, is of another kind, or its weights do not fit; names the culprit.
    """
    return load_with_header(weights, kind=kind, source=source, map_location=map_location, dtype=dtype, **options)[0]


def load_with_header(
    weights: str | Path,
    *,
    kind: str | None = None,
    source: str | None = None,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> tuple[Any, Header]:
    """As ``load``, and what the file says beside the weights: a header, with notes of the training.

    Raises:
        FileNotFoundError: as ``load``.
        UserError: as ``load``.
    """
    with mmap_scope():
        head, state, path = _read(weights, source, options, kind)
        release()
        model = checkpoint.assemble(head, state, path, map_location=map_location, kind=kind, dtype=dtype)
        return model, head


def load_vae(weights: str | Path, *, map_location: str | torch.device = "cpu") -> Any:
    """An image tokenizer, or that of a DALLE.

    Raises:
        FileNotFoundError: as ``load``.
        UserError: as ``load``; and where it is a CLIP or a probe.
    """
    model, head = load_with_header(weights, map_location=map_location)
    if role(head) in ("clip", "probe"):
        raise UserError(f"{weights} holds a {head['kind']}, an image tokenizer or a DALLE with one is needed")
    return model.vae if role(head) == "dalle" else model


def load_scorer(name: str, device: str | torch.device = "cpu") -> Any:
    """What ranks: a CLIP, found as ``load`` finds it, or an object of a user's own class, ``package.module.Class``.

    The class is built without arguments; on which device it computes is its own affair. A name is an import path only
    where it cannot be a file, a release or an id of the hub.

    Raises:
        FileNotFoundError: as ``load``.
        UserError: as ``load``; or there is no such module or class, or the class needs arguments.
    """
    if not is_import_path(name):
        return load(name, kind="clip").to(device)
    module_name, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and something that it imports is not
        raise UserError(
            f"{name} is neither a file nor can it be imported: there is no module {error.name}; install it, or put "
            "its folder into PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(f"{name} cannot rank: the module {module_name} has no class {class_name}")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise UserError(f"{name} is built without arguments, and it needs some ({error})") from error
    return found()


def is_import_path(name: str) -> bool:
    """Whether a text can only be ``package.module.Class``: no file, release or name of weights."""
    dotted = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name) is not None
    return dotted and name not in hub.RELEASES and not name.endswith(hub.SUFFIXES) and not Path(name).exists()


def read_header(weights: str | Path, *, kind: str | None = None) -> Header:
    """What a model would be, without building it.

    Raises:
        FileNotFoundError: as ``load``.
        UserError: as ``load``.
    """
    path, source, _ = locate(weights, None, kind)
    if source is None and checkpoint.is_ours(path):
        return checkpoint.read_header(path, kind=kind)
    with mmap_scope():
        head, _, path = _read(weights, source, {}, kind)
    checkpoint.check_kind(head, kind, path)
    return head


def _read(
    weights: str | Path, source: str | None, options: Mapping[str, Any], kind: str | None
) -> tuple[Header, State, Path]:
    """Header and weights of a file, whoever wrote it, and where it lies."""
    path, source, told = locate(weights, source, kind)
    if source is not None or not checkpoint.is_ours(path):
        return *sources.convert(path, source, **{**told, **options}), path
    if options:
        raise UserError(f"{path} is a checkpoint of ours, which takes no {', '.join(options)}")
    return *checkpoint.read_all(path), path


def locate(
    weights: str | Path, source: str | None, kind: str | None = None
) -> tuple[Path, str | None, Mapping[str, Any]]:
    """Where the weights lie, downloaded if need be, their format as far as it is known, and options of its importer.

    Raises:
        FileNotFoundError: neither a file nor a name nor an id of the hub.
        UserError: it cannot be downloaded, or what came along is damaged.
    """
    path, name = Path(weights), str(weights)
    if not name:
        raise UserError(
            f"weights= is empty: give a file, a folder, an id of the hub or a name ({', '.join(hub.RELEASES)})"
        )
    options: Mapping[str, Any] = {}
    row = hub.RELEASES.get(name)
    bundled = row is not None and row.bundled  # a folder of that name is likely theirs
    if not path.exists() or (bundled and path.is_dir()):
        if row is None and not hub.is_hub_id(name):
            raise FileNotFoundError(
                f"no file or folder {weights}, nor a released model of that name ({', '.join(hub.RELEASES)})"
            )
        path = hub.fetch(name, kind)
        if row is not None:
            source, options, path = source or row.source, row.told(path), path / row.path
    if path.is_dir() and (path / checkpoint.HUB_FILE).is_file() and checkpoint.is_ours(path / checkpoint.HUB_FILE):
        path = path / checkpoint.HUB_FILE
    return path, source, options
