"""The one checkpoint format: a header {kind, version, config, text_tokenizer, vae, training} and the weights.

``.safetensors`` keeps the header as JSON in its metadata; any other suffix is a ``torch.save`` of the header with a
``state_dict``, readable with ``weights_only=True``. The ``.ckpt`` files of our Lightning runs carry the same header.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle_pytorch.checkpoints.reader import mmap_scope, read, release, safetensors_notes
from dalle_pytorch.checkpoints.text_encoder import build_text_encoder
from dalle_pytorch.errors import UserError, first_line, some
from dalle_pytorch.files import atomic
from dalle_pytorch.models.clip import CLIP, CLIPConfig
from dalle_pytorch.models.dalle import DALLE, DALLEConfig
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig
from dalle_pytorch.models.openai_dvae import OpenAIDVAE, OpenAIDVAEConfig
from dalle_pytorch.models.pretrained_clip import PretrainedCLIP, PretrainedCLIPConfig
from dalle_pytorch.models.probe import Probe, ProbeConfig
from dalle_pytorch.models.skeleton import skeleton
from dalle_pytorch.models.text_encoder import TextEncoderConfig
from dalle_pytorch.models.transformer import ForeignConfig, TransformerConfig
from dalle_pytorch.models.vq_vae import VQVAE, VQVAEConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
from dalle_pytorch.text import TextTokenizer, text_tokenizer_from_state

Header: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Tensor]
Device: TypeAlias = str | torch.device

METADATA_KEY = "dalle_pytorch"
SHARDED_META = "meta.pt"  # Lightning's name of what is not sharded
HUB_FILE = "model.safetensors"  # what the hub calls the weights of a repository
HEADER_KEYS = ("kind", "version", "config", "text_tokenizer", "text_encoder", "vae", "training")


class Kind(NamedTuple):
    """A network that can be saved."""

    role: str
    """What it can stand for: "vae" (an image tokenizer), "dalle" (captions to image tokens), "clip" (a ranker),
    "probe" (a classifier) or "text_encoder" (part of a DALLE)."""
    model: Callable[..., Any]
    config: type[Any]


VERSION = 1
KINDS: dict[str, Kind] = {
    "vae": Kind("vae", DiscreteVAE, DiscreteVAEConfig),
    "vq_vae": Kind("vae", VQVAE, VQVAEConfig),
    "openai_dvae": Kind("vae", OpenAIDVAE, OpenAIDVAEConfig),
    "vqgan": Kind("vae", VQGAN, VQGANConfig),
    "dalle": Kind("dalle", DALLE, DALLEConfig),
    "dalle_bart": Kind("dalle", DALLEBart, DALLEBartConfig),
    "clip": Kind("clip", CLIP, CLIPConfig),
    "pretrained_clip": Kind("clip", PretrainedCLIP, PretrainedCLIPConfig),
    "probe": Kind("probe", Probe, ProbeConfig),
    "text_encoder": Kind("text_encoder", build_text_encoder, TextEncoderConfig),
}


def make_header(
    config: Any,
    *,
    text_tokenizer: TextTokenizer | None = None,
    text_encoder: Header | None = None,
    vae: Header | None = None,
    training: Mapping[str, Any] | None = None,
) -> Header:
    """A header from its parts.

    Args:
        config: a dataclass of one of the KINDS.
        text_tokenizer: of a DALLE or a CLIP.
        text_encoder: header of a DALLE's text encoder, if it has one; its weights are called ``text_encoder.*``.
        vae: header of a DALLE's image tokenizer, whose weights are called ``vae.*``.
        training: free notes (step, metrics, settings).

    Raises:
        ValueError: the config is of no known kind; names its class.
    """
    kind = next((kind for kind, row in KINDS.items() if isinstance(config, row.config)), None)
    if kind is None:
        raise UserError(f"{type(config).__name__} is of no kind that can be saved: {', '.join(KINDS)}")
    return {
        "kind": kind,
        "version": VERSION,
        "config": asdict(config),
        "text_tokenizer": None if text_tokenizer is None else text_tokenizer.state(),
        "text_encoder": text_encoder,
        "vae": vae,
        "training": dict(training or {}),
    }


def header(model: nn.Module, training: Mapping[str, Any] | None = None) -> Header:
    """The header of a model.

    Raises:
        ValueError: the model is of no known kind; names its class.
    """
    config: Any = getattr(model, "config", None)
    if not any(isinstance(config, row.config) for row in KINDS.values()):
        known = ", ".join(row.config.__name__.removesuffix("Config") for row in KINDS.values())
        raise UserError(f"{type(model).__name__} cannot be saved: not one of {known}")
    vae: Any = getattr(model, "vae", None)
    text_encoder: Any = getattr(model, "text_encoder", None)
    return make_header(
        config,
        text_tokenizer=getattr(model, "text_tokenizer", None),
        text_encoder=None if text_encoder is None else header(text_encoder),
        vae=None if vae is None else header(vae),
        training=training,
    )


def role(head: Header) -> str:
    """What the model of a header can stand for.

    Raises:
        ValueError: an unknown kind.
    """
    if head["kind"] not in KINDS:
        raise UserError(f"kind {head['kind']!r} is not one of {', '.join(KINDS)}")
    return KINDS[head["kind"]].role


def config_of(head: Header) -> Any:
    """The settings of a header; in files of before the group ``foreign`` its options lie among the others.

    Raises:
        UserError: an unknown kind or setting, or a setting out of range; names it.
    """
    role(head)  # refuses an unknown kind
    config_class, settings = KINDS[head["kind"]].config, dict(head["config"])
    if issubclass(config_class, TransformerConfig):
        names = {item.name for item in fields(ForeignConfig)} & settings.keys()
        flat = {name: settings.pop(name) for name in names}
        settings["foreign"] = _filled(ForeignConfig, {**settings.get("foreign", {}), **flat})
    return _filled(config_class, settings)


def _filled(config_class: type[Any], settings: dict[str, Any]) -> Any:
    if left := settings.keys() - {item.name for item in fields(config_class)}:
        raise UserError(f"{config_class.__name__} has no {', '.join(sorted(left))}")
    return config_class(**settings)


def build(head: Header) -> Any:
    """The model that a header describes, its parameters still on the meta device: see ``load_state``.

    Raises:
        ValueError: an unknown kind or setting, or a setting out of range; names it.
    """
    parts = {"vae": build(head["vae"])} if role(head) == "dalle" else {}
    if head.get("text_encoder") is not None:  # files of earlier versions do not mention it
        parts["text_encoder"] = build(head["text_encoder"])
    config = config_of(head)
    with skeleton():
        model = KINDS[head["kind"]].model(config, **parts)
    if head["text_tokenizer"] is not None:
        model.text_tokenizer = text_tokenizer_from_state(head["text_tokenizer"])
    return model


CAME_LATER: dict[str, dict[str, Any]] = {
    "vae": {"strides": [], "fine_blocks": 0},
    "vq_vae": {"strides": [], "fine_blocks": 0, "activation": "tanh"},
    "vqgan": {
        "levels": [], "activation": "tanh", "decay": 0.99, "idle": 0.1, "commitment": 0.25, "entropy": 0.002,
        "likelihood": "l1", "norm_groups": 32,
    },
}  # fmt: skip
"""Settings of image tokenizers that earlier versions did not have, at their defaults."""


def describe_tokenizer(vae: nn.Module) -> dict[str, Any]:
    """What token shards say about the image tokenizer that they are of: kind, hashes, sizes; JSON can hold it.

    Raises:
        ValueError: an image tokenizer that cannot be saved, and so not be told from others.
    """
    head = header(vae)
    # a setting that came later, at its default, leaves the hash as it was: token shards of before stay valid
    later = CAME_LATER.get(head["kind"], {})
    known = {name: value for name, value in head["config"].items() if name not in later or later[name] != value}
    if head["kind"] == "vq_vae" and known["quantizer"] == "ema":
        known["quantizer"] = "vq"  # its first name
    settings = json.dumps(known, sort_keys=True)
    sizes = {name: getattr(vae, name) for name in ("codebook_size", "grid_size", "image_size")}
    hashes = {
        "config_sha256": hashlib.sha256(settings.encode()).hexdigest(),
        "weights_sha256": weights_sha256(vae),
        "tokens_sha256": weights_sha256(vae, without=decoding_tensors(vae)),
    }
    return {"kind": head["kind"], **hashes, **sizes}


def token_differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """In what two image tokenizers, as ``describe_tokenizer`` says them, make or mean other tokens; [] = in nothing.

    They may have different decoders, unless ``stored`` is from a version that noted no hash without them.
    """
    other = "weights_sha256" if "tokens_sha256" in stored else "tokens_sha256"
    names = [name for name in given if name != other]
    return [f"{name} is {stored.get(name)}, not {given[name]}" for name in names if stored.get(name) != given[name]]


def decoding_tensors(vae: nn.Module) -> Set[int]:
    """Ids of the parameters and buffers that only make images of tokens; none where the network does not tell."""
    parts = getattr(vae, "decoding_parts", [])
    return {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}


def weights_sha256(net: nn.Module, *, without: Set[int] = frozenset()) -> str:
    """SHA-256 of names, types, shapes and numbers of a network's weights, whatever file they come from.

    Args:
        net: the network.
        without: ids of parameters and buffers that are left out.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(net.state_dict(keep_vars=True).items()):
        if id(tensor) in without:
            continue
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return weights.hexdigest()


def save(
    model: nn.Module,
    path: str | Path,
    *,
    training: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model with its tokenizers, in one step: an interrupted write leaves no half file.

    Args:
        model: of one of the KINDS: a DiscreteVAE, DALLE, CLIP, ...
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


def load(
    path: str | Path,
    *,
    map_location: Device = "cpu",
    kind: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Any:
    """The model of a checkpoint: ours in either format, or the ``.ckpt`` of one of our runs, sharded or not.

    Args:
        path: the file.
        map_location: device of the weights.
        kind: "vae" (any image tokenizer), "dalle", "clip" or "probe" if nothing else will do; None = any.
        dtype: of the weights; None = as they are stored.

    Returns:
        The model in eval mode, with its text tokenizer; a DALLE with its image tokenizer as well.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint of ours, truncated, of another kind or version, keys missing or left over, or weights
            that are not finite.
    """
    with mmap_scope():
        head, state = read_all(Path(path))
        return assemble(head, state, Path(path), map_location=map_location, kind=kind, dtype=dtype)


def assemble(
    head: Header,
    state: State,
    path: Path,
    *,
    map_location: Device = "cpu",
    kind: str | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> Any:
    """A model of what has been read; ``state`` is used up, so that no weight is in memory twice.

    In a ``mmap_scope`` block memory of the file is given back after each weight that is converted to ``dtype``.

    Raises:
        ValueError: as ``load``; names ``path``.
    """
    check_kind(head, kind, path)
    try:
        model = build(head)
        for name, tensor in state.items():
            wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            if wanted != tensor.dtype or not tensor.is_contiguous():  # some formats store transposed matrices
                state[name] = tensor.to(wanted, memory_format=torch.contiguous_format, copy=True)
            check_finite(name, state[name], tensor)
            release()
        load_state(model, state)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from error
    model = model.to(map_location).eval()
    release()
    return model


def is_ours(path: Path) -> bool:
    """Whether a file or folder is a checkpoint of this package, whole or not."""
    if path.is_dir():
        return (path / SHARDED_META).is_file()
    if path.suffix == ".safetensors":
        with contextlib.suppress(ValueError):
            return METADATA_KEY in _notes(path)
        return False
    content = read(path)
    return isinstance(content, dict) and "kind" in content and "state_dict" in content


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
        head = _read_safetensors_header(path) if _is_safetensors(path) else _read_torch(path, mmap=True)[0]
    check_kind(head, kind, path)
    return head


def check_finite(name: str, tensor: Tensor, stored: Tensor) -> None:
    """Refuse a weight with NaN or infinite numbers: what is computed with it looks like a result and is none.

    One pass over the numbers, and no memory: a sum is finite only if all of them are.

    Args:
        name: of the weight.
        tensor: in the type that it is used in.
        stored: in that of its file.

    Raises:
        UserError: names the weight, and whether only the type is too narrow.
    """
    if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
        return
    if tensor.element_size() > 1 and tensor.isfinite().all():
        return  # only the sum is too large
    finite = (stored.float() if stored.element_size() == 1 else stored).isfinite()  # not there for 8 bits
    if stored.dtype != tensor.dtype and finite.all():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"weight {name} is too large for {kind}: choose bf16 or fp32, whose range is wider")
    count = int((~finite).sum())
    raise UserError(
        f"weight {name} is not finite ({count} of {stored.numel()} numbers are NaN or infinite): the training diverged "
        "or the file is damaged; take an earlier checkpoint"
    )


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put weights into a model, strictly; a name may be absent only where the model ties it to one that is there.

    The tensors themselves become the model's, without a copy: their type is its type.

    Raises:
        ValueError: keys missing or left over, or another shape; names them.
    """
    own = model.state_dict(keep_vars=True)
    full = dict(state)
    ties = [([name for name in names if name in state], names) for names in tied(own)]
    full |= apart({given[0]: state[given[0]] for given, _ in ties if given})
    for given, names in ties:
        if given and isinstance(own[names[0]], nn.Parameter):  # as one parameter, or they would go apart in training
            shared = nn.Parameter(full[given[0]], requires_grad=own[names[0]].requires_grad)
            full.update(dict.fromkeys(names, shared))
    missing, left = sorted(own.keys() - full.keys()), sorted(full.keys() - own.keys())
    if missing or left:
        raise UserError(f"weights do not fit: missing {some(missing)}, left over {some(left)}")
    for name, tensor in own.items():
        if tensor.shape != full[name].shape:
            raise UserError(
                f"weight {name} is {tuple(full[name].shape)} in the file, {tuple(tensor.shape)} in the model"
            )
    model.load_state_dict(full, assign=True)


def distinct(state: Mapping[str, Tensor]) -> State:
    """The tensors of a state, each once under the first of its names, contiguous and alone in memory."""
    first = {names[0] for names in tied(state)}
    return {name: alone(tensor.detach()) for name, tensor in state.items() if name in first}


def alone(tensor: Tensor) -> Tensor:
    """The tensor if it is all of its storage, or else a copy that is."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def apart(state: Mapping[str, Tensor]) -> State:
    """The tensors of a state, copied where they lie on others, which training one would change too."""
    copies, end = dict(state), 0
    for name in sorted(state, key=lambda name: state[name].data_ptr()):
        tensor = state[name]
        if tensor.numel() and not tensor.is_meta and tensor.data_ptr() < end:
            copies[name] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    return copies


def tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names grouped by tensor: weights that are shared have several."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        # An empty tensor has no place of its own, one without memory only itself.
        groups.setdefault(id(tensor) if tensor.is_meta else place if tensor.numel() else name, []).append(name)
    return list(groups.values())


def read_all(path: Path) -> tuple[Header, State]:
    """Header and weights of a checkpoint of ours, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as ``load``.
    """
    if path.is_dir():
        return _read_sharded(path)
    if _is_safetensors(path):
        return _read_safetensors_header(path), read(path)
    return _read_torch(path)


def _read_torch(path: Path, *, mmap: bool = False) -> tuple[Header, State]:
    """Header and weights of a file of ``torch.save``; with ``mmap`` weights are not read before they are used."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # foreign bytes can break the unpickler in any way
        # The first line only: torch goes on to advise weights_only=False.
        raise UserError(f"{path} cannot be read: truncated, or not a checkpoint ({first_line(error)})") from error
    if not isinstance(content, dict) or "state_dict" not in content or "kind" not in content:
        raise UserError(f"{path} is not a checkpoint of dalle_pytorch: it has no kind")
    head = {key: content.get(key) for key in HEADER_KEYS}
    state = content["state_dict"]
    if "pytorch-lightning_version" in content:  # the LightningModule holds the model as `net`
        state = {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}
    return head, state


def _read_sharded(path: Path) -> tuple[Header, State]:
    """A checkpoint of sharded weights, a folder: the weights of all processes put together, nothing else of it."""
    # half a second to import, and few need it
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    head = _read_sharded_header(path)
    reader, prefix = FileSystemReader(path), "state_dict.net."  # the LightningModule holds the model as `net`
    parts = reader.read_metadata().state_dict_metadata
    state: State = {
        name: torch.empty(part.size, dtype=part.properties.dtype)
        for name, part in parts.items()
        if name.startswith(prefix) and isinstance(part, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return head, {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _read_sharded_header(path: Path) -> Header:
    if not (path / SHARDED_META).is_file() or not (path / ".metadata").is_file():
        raise UserError(f"{path} is a folder, but no checkpoint of sharded weights, or an incomplete one")
    content = torch.load(path / SHARDED_META, map_location="cpu", weights_only=True)
    return {key: content.get(key) for key in HEADER_KEYS}


def _read_safetensors_header(path: Path) -> Header:
    metadata = _notes(path)
    if METADATA_KEY not in metadata:
        raise UserError(f"{path} is not a checkpoint of dalle_pytorch: its metadata has no {METADATA_KEY!r}")
    return json.loads(metadata[METADATA_KEY])


def _notes(path: Path) -> dict[str, str]:
    try:
        return safetensors_notes(path)
    except Exception as error:  # foreign bytes
        raise UserError(f"{path} cannot be read: truncated, or not safetensors ({first_line(error)})") from error


def _is_safetensors(path: Path) -> bool:
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    return path.suffix == ".safetensors"


def check_kind(head: Header, kind: str | None, path: Path) -> None:
    """Refuse a header of another format version, or of another kind than ``kind``."""
    if head["version"] != VERSION:
        raise UserError(f"{path} has format version {head['version']}, this program reads {VERSION}")
    if kind is not None and head["kind"] in KINDS and role(head) != kind:
        raise UserError(f"{path} holds a {head['kind']}, a {kind} is needed")
