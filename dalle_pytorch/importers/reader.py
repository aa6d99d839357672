"""Read weight files of other programs without running anything in them.

A torch file is a pickle beside raw numbers, and a pickle may name any function to be called. Here it can name tensors,
plain containers and the *classes* of a few known packages only. Such a class becomes an inert `Stub`, which keeps what
the file says about an object and does nothing; any other name ends the reading. TorchScript archives are the same kind
of file with a program added, which is not looked at.

Tensors are views of the file, mapped into memory: reading costs nothing until a tensor is used.

Source: the formats are those of torch.serialization (zip since torch 1.6, before it the "legacy" one).
"""

import io
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import safe_open
from torch import Tensor

HARMLESS = ("__torch__", "argparse", "collections", "dall_e", "dalle", "deepspeed", "lightning", "lightning_fabric",
            "numpy", "omegaconf", "pathlib", "pytorch_lightning", "taming", "torch", "transformers")  # fmt: skip
"""Packages whose classes may be named in a file; none of them is imported."""
LOWER_CASE = ("device", "dtype", "ndarray", "scalar", "_reconstruct", "defaultdict")
"""Names of such packages that do not look like classes and may stand in a file all the same."""
STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
}
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class Stub:
    """What a file says about an object of a class that is not imported.

    Attributes:
        name: module and class.
        args: what it would have been made with.
        state: what it would have been filled with; for most objects their ``__dict__``.
    """

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **_: Any) -> "Stub":
        """Keeps the arguments."""
        stub = object.__new__(cls)
        stub.args, stub.state = args, None
        return stub

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Keeps the state."""
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of a class derived from dict; not kept."""

    def append(self, item: Any) -> None:
        """Items of a class derived from list; not kept."""

    def extend(self, items: Any) -> None:
        """As ``append``."""


class Mappings:
    """The files that are mapped inside a ``with`` block."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def __enter__(self) -> "Mappings":
        self.token = _mappings.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _mappings.reset(self.token)

    def release(self) -> None:
        """Give back the memory of what has been read so far; it is read again when used again.

        Not once a tensor of these files has been written to: the change would be lost.
        """
        for mapping in self.maps:
            mapping.madvise(mmap.MADV_DONTNEED)


_mappings: ContextVar[Mappings | None] = ContextVar("mappings", default=None)


def read(path: str | Path) -> Any:
    """Content of a torch file (zip, legacy or TorchScript) or of a safetensors file.

    Args:
        path: the file.

    Returns:
        What was saved: a dict of tensors, a `Stub` of a module, or whatever else; tensors are on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, of another format, or it names something that is not on the list above.
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
            with safe_open(path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        if start.startswith(b"\x80"):
            return _read_legacy(path)
    except Refused as error:
        raise ValueError(f"{path} {error}; nothing was loaded") from None
    except Exception as error:  # foreign bytes can break an unpickler in any way
        raise ValueError(f"{path} cannot be read: truncated or damaged ({_first_line(error)})") from error
    hint = ": it looks like a web page, download it again" if start.lstrip()[:1] == b"<" else ""
    raise ValueError(f"{path} is neither a torch nor a safetensors file{hint}")


def state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors of a content under dotted names: of a pickled module, a TorchScript archive, or nested dicts.

    Buffers that a module does not save are left out, as ``Module.state_dict`` does.
    """
    return dict(_walk(content, ""))


def _walk(content: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Stub):
        content = content.state if isinstance(content.state, dict) else {}
        if "_modules" in content:
            skipped = content.get("_non_persistent_buffers_set", ())
            buffers = {name: value for name, value in content["_buffers"].items() if name not in skipped}
            content = {**content["_parameters"], **buffers, **content["_modules"]}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, dict | Stub):
            yield from _walk(value, f"{prefix}{name}.")


class Refused(Exception):
    """The file names what must not be called."""


class Storage(NamedTuple):
    """Numbers in a row, which tensors are views of."""

    numbers: Tensor


class Call(NamedTuple):
    """A function that a file may call; a tuple, so that no file can change it."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.function(*args)


def _tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.numbers.as_strided(size, stride, offset)  # refuses what lies outside the storage


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _typed(function: Call, _: Any, args: tuple[Any, ...], __: Any) -> Any:
    if not isinstance(function, Call):
        raise Refused("makes a tensor in an unknown way")
    return function(*args)


def _object(kind: type[Any], *_: Any) -> Any:
    return kind()


def _same(data: Any, *_: Any) -> Any:
    return data


CALLS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Call(_typed),
    ("copyreg", "_reconstructor"): Call(_object),
    ("copy_reg", "_reconstructor"): Call(_object),
    ("torch", "Size"): Call(_same),
    **{
        ("torch.jit._pickle", f"build_{kind}list"): Call(_same)
        for kind in ("int", "tensor", "double", "bool")
    },
    ("torch.jit._pickle", "restore_type_tag"): Call(_same),
    ("collections", "OrderedDict"): OrderedDict,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, dict, list, tuple, object, slice, complex, int, float, bool, str)
    },
}  # fmt: skip


class Unpickler(pickle.Unpickler):
    """Builds tensors, containers and stubs; refuses every other name.

    Args:
        file: the pickle.
        storage: finds the numbers of a storage by (key, type, count).
    """

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage
        self.stubs: dict[str, type[Stub]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the file stands for."""
        if (module, name) in CALLS:
            return CALLS[module, name]
        full = f"{module}.{name}"
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        last = name.rsplit(".", 1)[-1]
        if module.split(".")[0] in HARMLESS and (last.lstrip("_")[:1].isupper() or last in LOWER_CASE):
            return self.stubs.setdefault(full, type(last, (Stub,), {"name": full}))
        raise Refused(f"calls {full}, which has no place in a file of weights")

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a tensor of the file is a view of; of a class that comes with its source the class."""
        if pid[0] == "module":
            return pid[1]
        _, dtype, key, _, count, *view = pid
        if view and view[0] is not None:
            raise Refused("holds views of storages, as torch 0.3 wrote them: save it again with a newer torch")
        return self.storage(str(key), dtype, count)


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise Refused("is a zip file, but none of torch's: it has no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
            raise Refused("was written on a big-endian machine: save it again on another")
        mapping = _map(path)

        def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
            entry = entries[f"{root}data/{key}"]
            if entry.compress_type != zipfile.ZIP_STORED or count * dtype.itemsize > entry.file_size:
                raise Refused(f"holds less data than its tensor {key} needs")
            file.seek(entry.header_offset + 26)  # the local header repeats the name and may have another extra field
            name, extra = struct.unpack("<HH", file.read(4))
            return _numbers(mapping, dtype, count, entry.header_offset + 30 + name + extra)

        return Unpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


def _read_legacy(path: Path) -> Any:
    """Magic number, version, machine, the pickle, the keys of its storages, and then their numbers."""
    parts: dict[str, Storage] = {}
    size = path.stat().st_size

    def storage(key: str, dtype: torch.dtype, count: int) -> Storage:
        if key not in parts:
            if count * dtype.itemsize > size:
                raise Refused(f"holds less data than its tensor {key} needs")
            parts[key] = Storage(torch.empty(count, dtype=dtype))
        return parts[key]

    with path.open("rb") as file:
        if Unpickler(file, storage).load() != LEGACY_MAGIC:
            raise Refused("is a pickle, but no file of torch")
        for _ in ("version", "machine"):
            Unpickler(file, storage).load()
        content = Unpickler(file, storage).load()
        for key in Unpickler(file, storage).load():
            numbers = parts[str(key)].numbers
            (count,) = struct.unpack("<q", file.read(8))
            if count != numbers.numel() or (
                count and file.readinto(numbers.view(torch.uint8).numpy().data) != numbers.nbytes
            ):
                raise EOFError(f"numbers of tensor {key} are missing")
        return content


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written to tensors stays in memory
    if (mappings := _mappings.get()) is not None:
        mappings.maps.append(mapping)
    return mapping


def _numbers(mapping: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Storage:
    if not count:
        return Storage(torch.empty(0, dtype=dtype))
    return Storage(torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def refuse(path: Path, why: str) -> NoReturn:
    """End an import with one line that names the file.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{path}: {why}")
