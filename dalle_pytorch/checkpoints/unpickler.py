"""Unpickle without running anything: names that a file may use, and inert stand-ins for what else is known.

A pickle may name any function to be called. Here it can name tensors, plain containers and the names of a few known
packages only. Those become an inert `Stub`, which keeps what the file says about an object and does nothing; any other
name ends the reading.
"""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

HARMLESS = ("__torch__", "argparse", "collections", "dall_e", "dalle", "deepspeed", "lightning", "lightning_fabric",
            "numpy", "omegaconf", "pathlib", "pytorch_lightning", "taming", "torch", "transformers")  # fmt: skip
"""Packages whose classes may be named in a file; none of them is imported."""
LOWER_CASE = ("device", "dtype", "ndarray", "scalar", "_reconstruct")
"""Names of such packages that do not look like classes and may stand in a file all the same."""
INERT = ("collections", "datetime", "numpy", "torch._C._nn", "torch.nn.functional", "typing")
"""Modules of which any name may stand in a file."""
TYPES = frozenset({"bool", "complex", "float", "int", "long", "range", "slice", "str", "tuple", "type",
                   "unicode", "xrange"})  # fmt: skip
"""Builtins that hyper-parameters are of or name."""
BUILTINS = ("builtins", "__builtin__")
STUBS = frozenset({*((module, name) for module in BUILTINS for name in TYPES), ("_operator", "getitem"),
                   ("operator", "getitem")})  # fmt: skip
"""Single names that may stand in a file; getitem is how ``Optional[int]`` is written."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16),
        *(torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64),
    )
}
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


class Refused(Exception):
    """The file has in it what must not be there."""


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

    def __setitem__(self, key: Any, value: Any) -> None:
        """Items of a class derived from dict; not kept."""

    def append(self, item: Any) -> None:
        """Items of a class derived from list; not kept."""

    def extend(self, items: Any) -> None:
        """As ``append``."""


class Storage(NamedTuple):
    """Numbers in a row, which tensors are views of."""

    numbers: Tensor


class Call(NamedTuple):
    """A function that a file may call."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.function(*args)


def is_count(value: Any) -> bool:
    """Whether it can be a number of things."""
    return type(value) is int and value >= 0


def _tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, Storage) or not all(map(is_count, (offset, *size, *stride))):
        raise Refused("holds a tensor whose sizes are no counts")
    numel = 1
    for side in size:
        numel *= side
    if numel > storage.numbers.numel():
        raise Refused(f"holds a tensor of {numel} numbers that has {storage.numbers.numel()}")
    return storage.numbers.as_strided(size, stride, offset)  # refuses what lies outside the storage


def _first(data: Any, *_: Any) -> Any:
    return data


def _typed(function: Call, _: Any, args: tuple[Any, ...], __: Any) -> Any:
    if not isinstance(function, Call):
        raise Refused("makes a tensor in an unknown way")
    return function(*args)


def _object(kind: type[Any], *_: Any) -> Any:
    return kind()


def _bytes(content: Any = b"", *_: Any) -> bytes:
    """Of bytes that the file holds; ``bytes(10**12)`` would take that much memory."""
    if not isinstance(content, bytes):
        raise Refused("makes bytes of something else")
    return content


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2, torch's own, writes bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused("encodes what is no text in latin1")
    return text.encode("latin1")


CALLS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): Call(_typed),
    ("copyreg", "_reconstructor"): Call(_object),
    ("copy_reg", "_reconstructor"): Call(_object),
    ("torch", "Size"): Call(_first),
    **{
        ("torch.jit._pickle", f"build_{kind}list"): Call(_first)
        for kind in ("int", "tensor", "double", "bool")
    },
    ("torch.jit._pickle", "restore_type_tag"): Call(_first),
    ("_codecs", "encode"): Call(_encode),
    ("collections", "OrderedDict"): OrderedDict,
    **{(module, kind.__name__): kind for module in BUILTINS for kind in (set, frozenset, dict, list, object)},
    **{(module, name): Call(_bytes) for module in BUILTINS for name in ("bytes", "bytearray")},
}  # fmt: skip


class Unpickler(pickle._Unpickler):
    """Builds tensors, containers and stubs; refuses every other name.

    Python's own unpickler in place of C's: only there can be said what becomes of an object's state.

    Args:
        file: the pickle.
        storage: finds the numbers of a storage by (key, type, count).
    """

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self.storage = storage
        self.stubs: dict[str, type[Stub]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the file stands for."""
        if (module, name) in CALLS:
            return CALLS[module, name]
        if module == "torch" and (dtype := STORAGES.get(name) or DTYPES.get(name)):
            return dtype
        full, last = f"{module}.{name}", name.rsplit(".", 1)[-1]
        known = module.split(".")[0] in HARMLESS and (last.lstrip("_")[:1].isupper() or last in LOWER_CASE)
        if known or module in INERT or (module, name) in STUBS:
            return self.stubs.setdefault(full, type(last, (Stub,), {"name": full}))
        if module.split(".")[0] == "dalle_pytorch":
            raise Refused(
                f"holds a whole module ({full}) and not its weights: load it where it was saved, and write it again, "
                "one of ours with dalle_pytorch.save(model, FILE), one of DALLE-pytorch as its train_dalle.py does"
            )
        raise Refused(f"calls {full}, which has no place in a file of weights")

    def persistent_load(self, pid: Any) -> Any:
        """The storage that a tensor of the file is a view of; of a class that comes with its source the class."""
        if pid[0] == "module":
            return pid[1]
        _, dtype, key, _, count, *view = pid
        if view and view[0] is not None:
            raise Refused("holds views of storages, as torch 0.3 wrote them: save it again with a newer torch")
        if not isinstance(dtype, torch.dtype) or not is_count(count):
            raise Refused(f"holds storage {key} of no type or no count")
        return self.storage(str(key), dtype, count)

    def load_build(self) -> None:
        """Give an object its state: only stubs take one."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif type(target) is not OrderedDict:  # a state dict's _metadata is of no use
            raise Refused(f"sets attributes of a {type(target).__name__}")

    def load_bytearray8(self) -> None:
        """No more bytes than the file has; the original makes room for what it says first."""
        (count,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(count))

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }
