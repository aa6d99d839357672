"""A network that a training looks through."""

from typing import Any, Generic, TypeVar

from torch import nn

Net = TypeVar("Net", bound=nn.Module)


class Frozen(nn.Module, Generic[Net]):
    """Holds a network that moves along with a training, but is no part of its checkpoints or of its averages.

    Args:
        net: stays in eval mode; its parameters get no gradients.
    """

    def __init__(self, net: Net) -> None:
        super().__init__()
        self._held = (net.requires_grad_(False).eval(),)  # in a tuple, which makes it no submodule

    @property
    def net(self) -> Net:
        """The network."""
        return self._held[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen[Net]":
        """Shares the network: Lightning's averages copy the module."""
        return Frozen(self.net)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves the network to another device or type."""
        self.net._apply(fn, recurse)
        return super()._apply(fn, recurse)
