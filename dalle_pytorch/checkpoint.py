"""The one checkpoint format: a header {kind, version, config, text_tokenizer, vae, training} and the weights.

``.safetensors`` keeps the header as JSON in its metadata; any other suffix is a ``torch.save`` of the header with a
``state_dict``, readable with ``weights_only=True``. The ``.ckpt`` files of our Lightning runs carry the same header.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle_pytorch.compat import CLIP, DALLE, DiscreteVAE
from dalle_pytorch.models.clip import CLIPConfig
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.discrete_vae import DiscreteVAEConfig
from dalle_pytorch.text import text_tokenizer_from_state

Header: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Tensor]
Model: TypeAlias = DiscreteVAE | DALLE | CLIP
Device: TypeAlias = str | torch.device

VERSION = 1
KINDS: dict[str, tuple[type[Any], type[Any]]] = {
    "vae": (DiscreteVAE, DiscreteVAEConfig),
    "dalle": (DALLE, DALLEConfig),
    "clip": (CLIP, CLIPConfig),
}
METADATA_KEY = "dalle_pytorch"
SHARDED_META = "meta.pt"  # Lightning's name of what is not sharded
HEADER_KEYS = ("kind", "version", "config", "text_tokenizer", "vae", "training")


def header(model: nn.Module, training: Mapping[str, Any] | None = None) -> Header:
    """What a checkpoint says about a model besides its weights; JSON can hold it.

    Args:
        model: a DiscreteVAE, DALLE or CLIP.
        training: free notes (step, metrics, settings).

    Raises:
        ValueError: the model is of no known kind; names its class.
    """
    config: Any = getattr(model, "config", None)
    kind = next((kind for kind, (_, config_class) in KINDS.items() if isinstance(config, config_class)), None)
    if kind is None:
        known = ", ".join(cls.__name__ for cls, _ in KINDS.values())
        raise ValueError(f"{type(model).__name__} cannot be saved: not one of {known}")
    tokenizer = getattr(model, "text_tokenizer", None)
    vae = getattr(model, "vae", None)
    return {
        "kind": kind,
        "version": VERSION,
        "config": asdict(config),
        "text_tokenizer": None if tokenizer is None else tokenizer.state(),
        "vae": None if vae is None else header(vae),
        "training": dict(training or {}),
    }


def save(
    model: nn.Module,
    path: str | Path,
    *,
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model with its tokenizers, in one step: an interrupted write leaves no half file.

    Args:
        model: a DiscreteVAE, DALLE or CLIP.
        path: ``.safetensors``, or another suffix for a ``torch.save`` file.
        training: free notes that JSON can hold.
        overwrite: replace an existing file.

    Raises:
        FileExistsError: the file is there and ``overwrite`` is off.
        ValueError: the model is of no known kind.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another path, or pass overwrite=True")
    head, state = header(model, training), distinct(model.state_dict())
    with atomic(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary, metadata={METADATA_KEY: json.dumps(head)})
        else:
            torch.save({**head, "state_dict": state}, temporary)


@overload
def load(path: str | Path, *, map_location: Device = "cpu", kind: Literal["vae"]) -> DiscreteVAE: ...
@overload
def load(path: str | Path, *, map_location: Device = "cpu", kind: Literal["dalle"]) -> DALLE: ...
@overload
def load(path: str | Path, *, map_location: Device = "cpu", kind: Literal["clip"]) -> CLIP: ...
@overload
def load(path: str | Path, *, map_location: Device = "cpu", kind: None = None) -> Model: ...
def load(path: str | Path, *, map_location: Device = "cpu", kind: str | None = None) -> Model:
    """The model of a checkpoint: ours in either format, or the ``.ckpt`` of one of our runs, sharded or not.

    Args:
        path: the file.
        map_location: device of the weights.
        kind: "vae", "dalle" or "clip" if nothing else will do; None = any.

    Returns:
        The model in eval mode, with its text tokenizer; a DALLE with its image tokenizer as well.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint of ours, truncated, of another kind or version, or keys missing or left over.
    """
    head, state = _read(Path(path), map_location)
    _check_kind(head, kind, Path(path))
    try:
        model = build(head)
        load_state(model, state)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model.to(map_location).eval()


def read_header(path: str | Path, *, kind: str | None = None) -> Header:
    """The header alone, without the weights of a ``.safetensors`` file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint of ours, truncated, or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        head = _read_sharded_header(path)
    else:
        head = _read_safetensors_header(path) if _is_safetensors(path) else _read(path, "cpu")[0]
    _check_kind(head, kind, path)
    return head


def build(head: Header) -> Model:
    """A model with fresh weights as a header describes it.

    Raises:
        ValueError: an unknown kind or setting, or a setting out of range; names it.
    """
    if head["kind"] not in KINDS:
        raise ValueError(f"kind {head['kind']!r} is not one of {', '.join(KINDS)}")
    model_class, config_class = KINDS[head["kind"]]
    if left := set(head["config"]) - {item.name for item in fields(config_class)}:
        raise ValueError(f"{config_class.__name__} has no {', '.join(sorted(left))}")
    config = config_class(**head["config"])
    parts = {"vae": build(head["vae"])} if head["kind"] == "dalle" else {}
    model = model_class(config, **parts)
    if head["text_tokenizer"] is not None:
        model.text_tokenizer = text_tokenizer_from_state(head["text_tokenizer"])
    return model


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights strictly; a name may be absent only where the model ties it to one that is there.

    Raises:
        ValueError: keys missing or left over, or another shape; names them.
    """
    own = model.state_dict()
    full = dict(state)
    for names in tied(own):
        given = [name for name in names if name in state]
        full.update((name, state[given[0]]) for name in names if given and name not in state)
    missing, left = sorted(own.keys() - full.keys()), sorted(full.keys() - own.keys())
    if missing or left:
        raise ValueError(f"weights do not fit: missing {_some(missing)}, left over {_some(left)}")
    for name, tensor in own.items():
        if tensor.shape != full[name].shape:
            raise ValueError(
                f"weight {name} is {tuple(full[name].shape)} in the file, {tuple(tensor.shape)} in the model"
            )
    model.load_state_dict(full)


def describe_tokenizer(vae: nn.Module) -> dict[str, Any]:
    """What token shards say about the image tokenizer that they are of: kind, hashes, sizes; JSON can hold it.

    Raises:
        ValueError: an image tokenizer that cannot be saved, and so not be told from others.
    """
    head = header(vae)
    settings = json.dumps(head["config"], sort_keys=True)
    weights = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    sizes = {name: getattr(vae, name) for name in ("codebook_size", "grid_size", "image_size")}
    hashes = {"config_sha256": hashlib.sha256(settings.encode()).hexdigest(), "weights_sha256": weights.hexdigest()}
    return {"kind": head["kind"], **hashes, **sizes}


def distinct(state: Mapping[str, Tensor]) -> State:
    """The tensors of a state, each once under the first of its names, contiguous and alone in memory."""
    first = {names[0] for names in tied(state)}
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name in first
    }


def tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names grouped by tensor: weights that are shared have several."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        # An empty tensor has no place of its own.
        groups.setdefault(place if tensor.numel() else name, []).append(name)
    return list(groups.values())


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends, and goes if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's files are for their owner only
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, map_location: Device) -> tuple[Header, State]:
    if path.is_dir():
        return _read_sharded(path)
    if _is_safetensors(path):
        head = _read_safetensors_header(path)
        with safe_open(path, framework="pt", device=str(map_location)) as file:
            return head, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # foreign bytes can break the unpickler in any way
        # The first line only: torch goes on to advise weights_only=False.
        raise ValueError(
            f"{path} cannot be read: truncated, or not a checkpoint ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content or "kind" not in content:
        raise ValueError(f"{path} is not a checkpoint of dalle_pytorch: it has no kind")
    head = {key: content.get(key) for key in HEADER_KEYS}
    state = content["state_dict"]
    if "pytorch-lightning_version" in content:  # the LightningModule holds the model as `net`
        state = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    return head, state


def _read_sharded(path: Path) -> tuple[Header, State]:
    """A checkpoint of sharded weights, a folder: the weights of all processes put together, nothing else of it."""
    # half a second to import, and few need it
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    head = _read_sharded_header(path)
    reader, prefix = FileSystemReader(path), "state_dict."
    parts = reader.read_metadata().state_dict_metadata
    state: State = {
        name: torch.empty(part.size, dtype=part.properties.dtype)
        for name, part in parts.items()
        if name.startswith(prefix) and isinstance(part, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return head, {name.removeprefix(prefix).removeprefix("net."): tensor for name, tensor in state.items()}


def _read_sharded_header(path: Path) -> Header:
    if not (path / SHARDED_META).is_file() or not (path / ".metadata").is_file():
        raise ValueError(f"{path} is a folder, but no checkpoint of sharded weights, or an incomplete one")
    content = torch.load(path / SHARDED_META, map_location="cpu", weights_only=True)
    return {key: content.get(key) for key in HEADER_KEYS}


def _read_safetensors_header(path: Path) -> Header:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: truncated, or not safetensors ({error})") from error
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} is not a checkpoint of dalle_pytorch: its metadata has no {METADATA_KEY!r}")
    return json.loads(metadata[METADATA_KEY])


def _is_safetensors(path: Path) -> bool:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    return path.suffix == ".safetensors"


def _check_kind(head: Header, kind: str | None, path: Path) -> None:
    if head["version"] != VERSION:
        raise ValueError(f"{path} has format version {head['version']}, this program reads {VERSION}")
    if kind is not None and head["kind"] != kind:
        raise ValueError(f"{path} holds a {head['kind']}, a {kind} is needed")


def _some(names: list[str]) -> str:
    """A few names for an error message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
