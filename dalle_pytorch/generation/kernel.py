"""A compiled step's cache on a CPU: keys and values that one call of C++ stores and reads.

``torch.compile`` makes no fast loop of the product of one query with many keys, and torch's own kernels are several
calls a layer, each of which takes longer than the work for one candidate. attention.cpp does it all in one, with the
prompt's keys and a candidate's own in one softmax. With many candidates the time goes into reading keys and values, so
that under "int8" they are stored as 8-bit integers, half the bytes of bf16.

Axes: as in cache.py.
"""

import ctypes
import functools
from importlib import resources

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.cache import Read, Slots

TYPES = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half", torch.int8: "int8_t"}
"""What the kernel stores, and its names in C++."""
SPAN = 32
"""Positions of a block."""


@functools.cache
def library(head_dim: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernel for a width of heads and a type of keys. Compiling takes three seconds; torch keeps it on disk.

    Raises:
        UserError: there is no C++ compiler.
    """
    from torch._inductor.codecache import CppCodeCache  # takes a second, and few need it
    from torch._inductor.exc import InvalidCxxCompiler

    source = resources.files("dalle_pytorch.generation").joinpath("attention.cpp").read_text()
    _, size = blocks_of(1, head_dim, dtype)
    constants = {"HEAD_DIM": head_dim, "STORED": TYPES[dtype], "SPAN": SPAN, "BLOCK_BYTES": size}
    lines = [f"#define {name} {value}" for name, value in constants.items()]
    try:
        made = CppCodeCache.load("\n".join([*lines, source]))
    except InvalidCxxCompiler as error:
        raise UserError("compile=true needs a C++ compiler on a CPU: install g++ or clang, or leave it out") from error
    made.attend.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_long] * 10
    made.store_prompt.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 2
    made.store_image.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3
    return made


def blocks_of(positions: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Blocks that positions of a head take, and bytes of one: keys, values padded to 16 channels, integers' scales."""
    width, scales = -(-head_dim // 16) * 16, 8 if dtype == torch.int8 else 0
    return -(-positions // SPAN), SPAN * ((head_dim + width) * dtype.itemsize + scales)


class KernelCache:
    """Keys and values of one layer, as LayerCache; those of the prompt are fp32.

    Args:
        prompt: keys and values of the prompts and of the given image tokens behind them, ``[2, g, h, t + m, e]``.
        prompt_length: t.
        slots: where image keys go.
        candidates: c.
        dtype: of the image's keys and values; int8 has a scale for each of them.
    """

    offset = 0

    def __init__(
        self, prompt: Float[Tensor, "2 g h s e"], prompt_length: int, slots: Slots, candidates: int, dtype: torch.dtype
    ) -> None:
        _, groups, heads, length, head_dim = prompt.shape
        t, kernel, pairs, device = prompt_length, library(head_dim, dtype), groups * heads, prompt.device
        blocks, size = blocks_of(t, head_dim, torch.float32)
        self.prompt = torch.zeros(blocks, pairs, size, dtype=torch.uint8, device=device)
        (k, v), at = prompt[:, :, :, :t].float().contiguous(), torch.arange(t, device=device)
        kernel.store_prompt(*pointers(k, v, at, self.prompt), pairs, t)
        blocks, size = blocks_of(slots.count, head_dim, dtype)
        self.image = torch.zeros(blocks, pairs * candidates, size, dtype=torch.uint8, device=device)
        given = slice(max(t, length - slots.count), length)
        (k, v), at = prompt[:, :, :, given].float().contiguous(), slots.write[given.start - t : length - t]
        kernel.store_image(*pointers(k, v, at, self.image), pairs, candidates, len(at))
        self.kernel, self.pairs, self.sizes = kernel.attend, pairs, (groups, candidates, heads, t)

    def attend(
        self, q: Float[Tensor, "r h q e"], k: Float[Tensor, "r h n e"], v: Float[Tensor, "r h n e"], read: Read
    ) -> Float[Tensor, "r h q e"]:
        """Store the keys and values of new positions, then attend to what these see; all contiguous and fp32."""
        groups, candidates, heads, _ = self.sizes
        shape = (groups * candidates, heads, len(read.write), q.shape[3])
        if not (k.shape == v.shape == shape and q.shape[:2] == shape[:2] and q.shape[2] % shape[2] == 0):
            raise ValueError(f"queries, keys, values of {q.shape}, {k.shape}, {v.shape} given, expected {shape}")
        out = torch.empty_like(q)
        parts = pointers(q, k, v, read.write, read.bias, out, self.prompt, self.image)
        counts = (k.shape[2], q.shape[2])
        self.kernel(*parts, self.pairs, *self.sizes, *counts, read.start, read.stop, torch.get_num_threads())
        return out

    def keep_rows(self, rows: int, groups: int) -> None:
        """Read no more than the first rows, those of the first groups."""
        self.sizes = (groups, *self.sizes[1:])

    def bytes(self) -> int:
        """Memory held."""
        return self.prompt.nbytes + self.image.nbytes


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Where the numbers of some tensors begin. They must live as long as these are used."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
