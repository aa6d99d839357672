"""An evaluation's work in parts, which several processes share where ``evaluate.py`` runs under torchrun.

The parts are the same for any number of processes, since a network may round otherwise in batches of another size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from dalle_pytorch.distributed import Processes

T = TypeVar("T")
R = TypeVar("R")

_TEAM: ContextVar[Processes | None] = ContextVar("team", default=None)


@contextmanager
def shared_by(processes: Processes | None) -> Iterator[None]:
    """Share all ``in_parts`` inside among these processes, which must all run the same program; None = alone."""
    token = _TEAM.set(processes)
    try:
        yield
    finally:
        _TEAM.reset(token)


def in_parts(function: Callable[[T], R], parts: Sequence[T]) -> list[R]:
    """The function of every part, in order; inside ``shared_by`` each process computes a share and gets all."""
    team = _TEAM.get()
    if team is None:
        return [function(part) for part in parts]
    with shared_by(None):  # a part is one process's: what it divides further, nobody else computes
        return team.map(function, parts)
