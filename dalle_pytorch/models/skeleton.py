"""Networks whose parameters take no memory until weights are put in their place."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

EMPTY = frozenset({torch.empty, torch.randn})
"""What makes large parameters. Buffers, which need their numbers, are made by other functions, as are the few
parameters that begin with a constant: those take their (little) memory."""
INITIAL = frozenset({"fill_", "mul_", *(name for name in dir(nn.init) if name.endswith("_") and name[0] != "_")})
"""What gives parameters their first numbers."""


@contextlib.contextmanager
def skeleton() -> Iterator[None]:
    """Modules made inside have their large parameters on the meta device; buffers are as ever.

    (``torch.device("meta")`` would leave constant buffers without their numbers.) Nothing global changes: a mode of
    torch functions concerns its own thread alone.
    """
    with _WithoutNumbers():
        yield


class _WithoutNumbers(TorchFunctionMode):
    """Parameters without memory or first numbers, for which torch would import 70 MB of its compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in EMPTY:
            return func(*args, **{**kwargs, "device": "meta"})
        tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes names
        if getattr(func, "__name__", "") in INITIAL and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)
