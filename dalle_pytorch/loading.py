"""``dalle_pytorch.load``: a model from our file, from somebody else's, or from the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dalle_pytorch import checkpoint
from dalle_pytorch.header import Header
from dalle_pytorch.importers import hub, sources
from dalle_pytorch.importers.reader import Mappings


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
            ``importers.hub.RELEASES``, or an id of the Hugging Face hub.
        kind: "vae" (any image tokenizer), "dalle" or "clip" if nothing else will do; None = any.
        source: the format of a foreign file, a name of ``importers.sources.SOURCES``; None = found from its content.
        map_location: device of the weights.
        dtype: of the weights; None = as they are stored.
        **options: what the importer of this source takes beyond the path.

    Returns:
        The model in eval mode, with its tokenizers.

    Raises:
        FileNotFoundError: no such file, name or id.
        ValueError: it cannot be read, is of another kind, or its weights do not fit; names the culprit.
    """
    path, source, told = locate(weights, source)
    if source is None and checkpoint.is_ours(path):
        if options:
            raise ValueError(f"{path} is a checkpoint of ours, which takes no {', '.join(options)}")
        return checkpoint.load(path, map_location=map_location, kind=kind, dtype=dtype)
    with Mappings() as mappings:
        head, state = sources.convert(path, source, **{**told, **options})
        mappings.release()
        return checkpoint.assemble(
            head, state, path, map_location=map_location, kind=kind, dtype=dtype, release=mappings.release
        )


def read_header(weights: str | Path, *, kind: str | None = None) -> Header:
    """What a model would be, without building it.

    Raises:
        FileNotFoundError: as ``load``.
        ValueError: as ``load``.
    """
    path, source, options = locate(weights, None)
    if source is None and checkpoint.is_ours(path):
        return checkpoint.read_header(path, kind=kind)
    head, _ = sources.convert(path, source, **options)
    checkpoint.check_kind(head, kind, path)
    return head


def locate(weights: str | Path, source: str | None) -> tuple[Path, str | None, Mapping[str, Any]]:
    """Where the weights lie, downloaded if need be, their format as far as it is known, and options of its importer.

    Raises:
        FileNotFoundError: neither a file nor a name nor an id of the hub.
        ValueError: it cannot be downloaded.
    """
    path, name = Path(weights), str(weights)
    options: Mapping[str, Any] = {}
    if not path.exists():
        if name not in hub.RELEASES and not hub.is_hub_id(name):
            raise FileNotFoundError(
                f"no file or folder {weights}, nor a released model of that name ({', '.join(hub.RELEASES)})"
            )
        path = hub.fetch(name)
        if name in hub.RELEASES:
            source, options = source or hub.RELEASES[name].source, hub.RELEASES[name].options
    if path.is_dir() and (path / checkpoint.HUB_FILE).is_file() and checkpoint.is_ours(path / checkpoint.HUB_FILE):
        path = path / checkpoint.HUB_FILE
    return path, source, options
