"""Networks whose parameters take no memory until weights are put in their place."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

INITIAL = frozenset({"fill_", "mul_", *(name for name in dir(nn.init) if name.endswith("_") and name[0] != "_")})
"""What gives parameters their first numbers."""
_wanted: ContextVar[bool] = ContextVar("skeleton", default=False)


@contextlib.contextmanager
def skeleton() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device; buffers are as ever.

    (``torch.device("meta")`` would leave constant buffers without their numbers.) Other threads are not concerned.
    """
    token = _wanted.set(True)
    try:
        with _WithoutNumbers():
            yield
    finally:
        _wanted.reset(token)


class _WithoutNumbers(TorchFunctionMode):
    """Leaves out first numbers on the meta device, for which torch would import 70 MB of its compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes names
        if getattr(func, "__name__", "") in INITIAL and isinstance(tensor, torch.Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


def _without_memory(_: nn.Module, __: str, param: nn.Parameter | None) -> Any:
    if not _wanted.get() or param is None or param.is_meta:
        return None  # as it is
    return nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)


# once and for ever: taking hooks away while another thread builds a network would break its loop over them
register_module_parameter_registration_hook(_without_memory)
