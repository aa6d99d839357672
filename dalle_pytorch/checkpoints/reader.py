"""Read weight files of other programs without running anything in them: torch's and safetensors.

A torch file is a pickle beside raw numbers. TorchScript archives are the same kind of file with a program added, which
is not looked at. Tensors are views of the file, mapped into memory: reading costs nothing until a tensor is used.

Sources: the formats are those of torch.serialization (zip since torch 1.6, before it the "legacy" one);
github.com/huggingface/safetensors, README.md.
"""

import io
import json
import math
import mmap
import struct
import zipfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle_pytorch.checkpoints.unpickler import Refused, Storage, Stub, Unpickler, is_count
from dalle_pytorch.errors import UserError, first_line

__all__ = [
    "Stub",
    "mmap_scope",
    "plain",
    "read",
    "read_safetensors",
    "release",
    "safetensors_notes",
    "state_dict",
    "weights_of",
]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
PARTS = ("state_dict", "model", "weights", "ema", "module")
"""Where a checkpoint that holds more keeps its weights. ``model`` before ``ema``: LlamaGen's GPTs were trained on its
codes (extract_codes_c2i.py)."""
WRAPPERS = ("module.", "_orig_mod.", "first_stage_model.")
"""What DataParallel, ``torch.compile`` and latent-diffusion put in front of the names of a network."""
SAFE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class mmap_scope:
    """The files that are mapped inside a ``with`` block."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def __enter__(self) -> "mmap_scope":
        self.token = _mappings.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _mappings.reset(self.token)


_mappings: ContextVar[mmap_scope | None] = ContextVar("mappings", default=None)


def release() -> None:
    """Give back the memory of what has been read so far of the mapped files; it is read again when used again.

    Outside of a ``mmap_scope`` block it does nothing. Not once a tensor of these files has been written to: the change
    would be lost.
    """
    mappings = _mappings.get()
    if mappings is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        for mapping in mappings.maps:
            mapping.madvise(mmap.MADV_DONTNEED)


def read(path: str | Path) -> Any:
    """Content of a torch file (zip, legacy or TorchScript) or of a safetensors file.

    Args:
        path: the file.

    Returns:
        What was saved: a dict of tensors, a `Stub` of a module, or whatever else; tensors are on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, of another format, or it names something that is not on the unpickler's list.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        start = file.read(16)
    try:
        if start.startswith(b"PK"):
            return _read_zip(path)
        if start[8:9] == b"{":
            return read_safetensors(path)
        if start.startswith(b"\x80"):
            return _read_legacy(path)
    except Refused as error:
        raise UserError(f"{path} {error}; nothing was loaded") from None
    except Exception as error:  # foreign bytes can break an unpickler in any way
        raise UserError(f"{path} cannot be read: truncated or damaged ({first_line(error)})") from error
    raise UserError(f"{path} {_no_weights(path)}")


def _no_weights(path: Path) -> str:
    """What a file is that is neither torch's nor safetensors, and what to do."""
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        return "is empty: download or copy it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS in place of the file: run git lfs pull in its repository, or download it again"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return "is neither a torch nor a safetensors file: it looks like a web page, download it again"
    if path.suffix == ".msgpack":
        return "is neither a torch nor a safetensors file: of Flax's weights give the folder"
    if all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start):
        return f"is a text and no file of weights; it begins with {start[:40].decode()!r}"
    return "is neither a torch nor a safetensors file"


def plain(value: Any) -> Any:
    """Settings as Python's own containers: of ``argparse.Namespace`` and OmegaConf what they hold.

    Raises:
        UserError: nested too deep.
    """
    try:
        return _plain(value)
    except RecursionError as error:
        raise UserError("the settings lie too deep in one another") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Stub) and isinstance(value.state, dict):
        state = value.state
        return _plain(next((state[part] for part in ("_content", "_val") if part in state), state))  # OmegaConf's nodes
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def weights_of(content: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint that may hold more, under their own names."""
    if isinstance(content, dict):
        content = next((content[part] for part in PARTS if isinstance(content.get(part), dict)), content)
    return state_dict(content)


def state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors of a content under dotted names: of a pickled module, a TorchScript archive, or nested dicts.

    Buffers that a module does not save are left out, as ``Module.state_dict`` does. A name of WRAPPERS in front of all
    of them is left out too.

    Raises:
        ValueError: nested too deep.
    """
    try:
        state = dict(_walk(content, "", ()))
    except RecursionError as error:
        raise UserError("the weights lie too deep in one another") from error
    while prefix := next((name for name in WRAPPERS if state and all(key.startswith(name) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _walk(content: Any, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Stub):
        content = content.state if isinstance(content.state, dict) else {}
        if "_modules" in content:
            skipped = content.get("_non_persistent_buffers_set", ())
            parts = [content.get(part, {}) for part in ("_parameters", "_buffers", "_modules")]
            content = {name: value for part in parts for name, value in part.items() if name not in skipped}
    if not isinstance(content, dict) or id(content) in above:  # what holds itself has no names of its own
        return
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict | Stub):
            yield from _walk(value, f"{prefix}{name}.", (*above, id(content)))


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise Refused("is a zip file, but none of torch's: it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        size = path.stat().st_size

        def small(name: str) -> bytes:
            if entries[name].compress_type != zipfile.ZIP_STORED or entries[name].file_size > size:
                raise Refused(f"has a compressed {name}, which torch does not write")
            return archive.read(name)

        if f"{root}byteorder" in entries and small(f"{root}byteorder") != b"little":
            raise Refused("was written on a big-endian machine: save it again on another")
        mapping = _map(path)

        def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
            entry = entries[f"{root}data/{key}"]
            if entry.compress_type != zipfile.ZIP_STORED or count * dtype.itemsize > entry.file_size:
                raise Refused(f"holds less data than its tensor {key} needs")
            file.seek(entry.header_offset + 26)  # the local header repeats the name and may have another extra field
            name, extra = struct.unpack("<HH", file.read(4))
            return Storage(_numbers(mapping, dtype, count, entry.header_offset + 30 + name + extra))

        return Unpickler(io.BytesIO(small(pickles[0])), storage).load()


def _read_legacy(path: Path) -> Any:
    """Magic number, version, machine, the pickle, the keys of its storages, and then their numbers."""
    parts: dict[str, Storage] = {}
    size = path.stat().st_size

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        if key not in parts:
            if count * dtype.itemsize + sum(part.numbers.nbytes for part in parts.values()) > size:
                raise EOFError(f"tensor {key} needs more bytes than the file has")
            parts[key] = Storage(torch.empty(count, dtype=dtype))
        return parts[key]

    with path.open("rb") as file:
        if Unpickler(file, storage).load() != LEGACY_MAGIC:
            raise Refused("is a pickle, but no file of torch")
        for _ in ("version", "machine"):
            Unpickler(file, storage).load()
        content = Unpickler(file, storage).load()
        keys = [str(key) for key in Unpickler(file, storage).load()]
        if set(keys) != parts.keys():
            raise Refused("lists other tensors than it has")
        for key in keys:
            numbers = parts[key].numbers
            (count,) = struct.unpack("<q", file.read(8))
            if count != numbers.numel() or (
                count and file.readinto(numbers.view(torch.uint8).numpy().data) != numbers.nbytes
            ):
                raise EOFError(f"numbers of tensor {key} are missing")
        return content


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped.

    Raises:
        ValueError: truncated or damaged.
    """
    header, start = _safetensors_header(path)
    header.pop("__metadata__", None)
    mapping, state, position = _map(path), {}, start
    for name, row in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = SAFE_DTYPES[row["dtype"]], row["shape"], row["data_offsets"]
        if not all(map(is_count, (begin, end, *shape))) or math.prod(shape) * dtype.itemsize != end - begin:
            raise UserError(f"the place of tensor {name} is not of its size")
        if start + begin != position:
            raise UserError(f"tensor {name} does not begin where the one before it ends")
        state[name] = _numbers(mapping, dtype, math.prod(shape), position).view(shape)
        position = start + end
    if position != path.stat().st_size:
        raise UserError("the numbers end before the file or after it")
    return {name: state[name] for name in header}


def safetensors_notes(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file.

    Raises:
        ValueError: truncated or damaged.
    """
    return _safetensors_header(path)[0].get("__metadata__", {})


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON at the start, and where the numbers begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if 8 + length > path.stat().st_size:
            raise UserError(f"its header of {length} bytes is cut off")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise UserError("its header is no map")
    return header, 8 + length


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written to tensors stays in memory
    if (mappings := _mappings.get()) is not None:
        mappings.maps.append(mapping)
    return mapping


def _numbers(mapping: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    if offset % dtype.itemsize:  # older safetensors do not begin at a multiple of 8
        return torch.frombuffer(bytearray(mapping[offset : offset + count * dtype.itemsize]), dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)
