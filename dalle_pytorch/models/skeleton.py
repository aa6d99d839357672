"""Networks whose parameters take no memory until weights are put in their place."""

import contextlib
import threading
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def skeleton() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device; buffers are as ever.

    (``torch.device("meta")`` would leave constant buffers without their numbers.) Other threads are not concerned.
    """
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def without_memory(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and threading.get_ident() == thread:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = without_memory
    try:
        yield
    finally:
        nn.Module.register_parameter = register
