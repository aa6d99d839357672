"""A place among the few requests that may wait for something: threads that wait are kept from other requests."""

import contextlib
import threading
from collections.abc import Iterator

from fastapi import HTTPException

MAX_WAITING = 8


class Room:
    """Room for ``MAX_WAITING`` threads.

    Args:
        full: what the others hear.
    """

    def __init__(self, full: str) -> None:
        self.full, self.places = full, threading.BoundedSemaphore(MAX_WAITING)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A place for the time of the block.

        Raises:
            HTTPException: there is none.
        """
        if not self.places.acquire(blocking=False):
            raise HTTPException(503, self.full, headers={"Retry-After": "1"})
        try:
            yield
        finally:
            self.places.release()
