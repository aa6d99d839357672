"""Read weights of Flax (``flax_model.msgpack``) without JAX, Flax or msgpack, and without running anything.

Format: one msgpack value of nested maps whose leaves are extension 1, an array as (shape, name of the dtype, bytes in C
order), or 3, a scalar likewise. Arrays over 2 ** 30 bytes are maps of flat pieces.

Only the places of the arrays are read at first; an array's numbers when it is asked for them. A file's weights are thus
never in memory twice, which msgpack's own reader could not do.

Sources: github.com/msgpack/msgpack/blob/master/spec.md; github.com/google/flax, flax/serialization.py.
"""

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dalle_pytorch.errors import UserError, refuse

DTYPES = {
    name: getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
NUMBERS = dict(zip(range(0xCA, 0xD4), "fdBHIQbhiq", strict=True))
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
LENGTHS = {
    code: (kind, number)
    for first, kind, numbers in (
        (0xC4, "bytes", "BHI"),
        (0xC7, "extension", "BHI"),
        (0xD9, "text", "BHI"),
        (0xDC, "list", "HI"),
        (0xDE, "map", "HI"),
    )
    for code, number in enumerate(numbers, first)
}
"""Values that begin with their length, and what number that is."""
SHORT = {
    **dict.fromkeys(range(0x80, 0x90), "map"),
    **dict.fromkeys(range(0x90, 0xA0), "list"),
    **dict.fromkeys(range(0xA0, 0xC0), "text"),
}
"""Values whose code has their length in its last bits."""
ARRAYS = (1, 3)  # the extensions that are arrays; 2 is a complex number
CHUNKED = "__msgpack_chunked_array__"
DEPTH = 32  # the deepest tree of a network has 8 levels


class Span(NamedTuple):
    """A place in the file."""

    start: int
    length: int


class Array(NamedTuple):
    """An array that is still in its file."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: tuple[Span, ...]

    def read(self) -> Tensor:
        """The numbers, in memory of their own."""
        flat = torch.empty(math.prod(self.shape), dtype=self.dtype)
        room, done = flat.view(torch.uint8).numpy().data, 0
        with self.path.open("rb") as file:
            for start, length in self.spans:
                file.seek(start)
                if file.readinto(room[done : done + length]) != length:
                    refuse(self.path, "has become shorter while it was read")
                done += length
        return flat.view(self.shape)


def read(path: str | Path) -> dict[str, Array]:
    """The arrays of a file under dotted names.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: truncated, not msgpack, or with something in it that is no array; names the file and the culprit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        scanner = Scanner(path, file)
        try:
            tree = scanner.value(0)
        except (struct.error, UnicodeDecodeError, EOFError) as error:
            raise UserError(f"{path} cannot be read: truncated, or not msgpack ({error})") from error
    if not isinstance(tree, dict) or scanner.position != scanner.size:
        refuse(path, "not weights of Flax: it is no single map")
    arrays: dict[str, Array] = {}
    _flatten(path, tree, "", arrays)
    return arrays


class Scanner:
    """Reads msgpack values, and for bytes their place only.

    Args:
        path: of the file, for messages.
        file: the file, at its start.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.position = path, file, 0
        self.size = path.stat().st_size

    def value(self, depth: int) -> Any:
        """The value that begins here."""
        if depth > DEPTH:
            refuse(self.path, f"not weights of Flax: nested more than {DEPTH} deep")
        code = self.number("B")
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 0x100
        if code in CONSTANTS:
            return CONSTANTS[code]
        if code in NUMBERS:
            return self.number(NUMBERS[code])
        if code in SHORT:
            return self.sized(SHORT[code], code & (31 if SHORT[code] == "text" else 15), depth)
        if code in LENGTHS:
            kind, number = LENGTHS[code]
            return self.sized(kind, self.number(number), depth)
        if 0xD4 <= code <= 0xD8:
            return self.sized("extension", 1 << code - 0xD4, depth)
        refuse(self.path, "not msgpack")

    def sized(self, kind: str, length: int, depth: int) -> Any:
        """The rest of a value of known length."""
        if kind == "bytes":
            return self.place(length)
        if kind == "text":
            return self.take(length).decode()
        if kind == "list":
            return [self.value(depth + 1) for _ in range(length)]
        if kind == "extension":
            return self.array(length, depth)
        found: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                refuse(self.path, f"not weights of Flax: a map has the key {key!r}, or has it twice")
            found[key] = self.value(depth + 1)
        return found

    def array(self, length: int, depth: int) -> Array:
        """An extension that is an array."""
        kind, end = self.number("b"), self.position + length
        if kind not in ARRAYS:
            refuse(self.path, f"holds an extension of type {kind}; weights are of type 1")
        content = self.value(depth + 1)
        match content:
            case [[*shape], str(name), Span() as span] if all(isinstance(side, int) and side >= 0 for side in shape):
                if name not in DTYPES:
                    refuse(self.path, f"holds an array of type {name}, known are {', '.join(DTYPES)}")
                if math.prod(shape) * DTYPES[name].itemsize == span.length and self.position == end:
                    return Array(self.path, tuple(shape), DTYPES[name], (span,))
        refuse(self.path, "damaged: an array's shape and bytes do not fit")

    def number(self, code: str) -> Any:
        """A number in big-endian order."""
        return struct.unpack(">" + code, self.take(struct.calcsize(">" + code)))[0]

    def take(self, length: int) -> bytes:
        """The next bytes."""
        self.file.seek(self.place(length).start)
        return self.file.read(length)

    def place(self, length: int) -> Span:
        """Where the next bytes are; steps over them."""
        span = Span(self.position, length)
        self.position += length
        if self.position > self.size:
            raise EOFError(f"{self.position - self.size} bytes are missing")
        return span


def _flatten(path: Path, tree: dict[str, Any], prefix: str, arrays: dict[str, Array]) -> None:
    if tree.get(CHUNKED) is True:
        arrays[prefix.removesuffix(".")] = _join(path, tree, prefix.removesuffix("."))
        return
    for key, value in tree.items():
        if isinstance(value, dict):
            _flatten(path, value, f"{prefix}{key}.", arrays)
        elif isinstance(value, Array):
            arrays[f"{prefix}{key}"] = value
        else:
            refuse(path, f"not weights of Flax: {prefix}{key} is {value!r}, no array")


def _join(path: Path, tree: dict[str, Any], name: str) -> Array:
    """The pieces of a large array as one; a list is a map from "0", "1", ... there."""
    shape, pieces = _list(tree.get("shape")), _list(tree.get("chunks"))
    if pieces and all(isinstance(side, int) for side in shape) and all(isinstance(piece, Array) for piece in pieces):
        whole = Array(path, tuple(shape), pieces[0].dtype, tuple(span for piece in pieces for span in piece.spans))
        fits = math.prod(shape) * whole.dtype.itemsize == sum(span.length for span in whole.spans)
        if fits and all(piece.dtype == whole.dtype for piece in pieces):
            return whole
    refuse(path, f"damaged: the pieces of {name} do not make up its shape")


def _list(values: Any) -> list[Any]:
    return [values.get(str(i)) for i in range(len(values))] if isinstance(values, dict) else []
