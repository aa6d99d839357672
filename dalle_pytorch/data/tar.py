"""Reads files inside a tar by position, whether the tar lies on disk or is compressed."""

import gzip
import io
import os
import tarfile
import weakref
import zlib
from collections import deque
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import UserError

GZIP_SUFFIX = ".gz"
MOST_OPEN = 256  # files of this process; systems often allow 1,024
_opened: deque[weakref.ref["TarReader"]] = deque()


class TarReader:
    """Random access to the files of one tar.

    A plain tar is read with ``os.pread``: one descriptor serves any number of threads and forked workers. A
    ``.tar.gz`` has no positions to jump to, so it is decompressed into memory once.

    Args:
        path: the tar.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._closer: weakref.finalize | None = None  # closes it with the reader, or before the interpreter ends
        self._memory: bytes | None = None

    def scan(self) -> list[tuple[str, int, int]]:
        """List (name, offset, size) of the files, in bytes, from the headers alone.

        Raises:
            FileNotFoundError: there is no such tar.
            ValueError: it is truncated or broken; names it.
        """
        if not self.path.is_file():
            raise FileNotFoundError(f"shard {self.path} is missing, though the index lists it")
        try:
            with self._open_tar() as tar:
                files = [(member.name, member.offset_data, member.size) for member in tar]
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{self.path} is truncated or not a tar file: {error}") from error
        end = self.path.stat().st_size if self._memory is None else len(self._memory)
        for name, offset, size in files:
            if offset + size > end:
                raise UserError(f"{self.path} is truncated: it ends inside {name!r}")
        return files

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes at a position.

        Raises:
            ValueError: the tar ends before; names it.
        """
        if self.path.suffix == GZIP_SUFFIX:
            data = self._decompressed()[offset : offset + size]
        else:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY)
                self._closer = weakref.finalize(self, os.close, self._descriptor)
                _opened.append(weakref.ref(self))
                while len(_opened) > MOST_OPEN:
                    if (oldest := _opened.popleft()()) is not None:
                        oldest.close()
            data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise UserError(f"{self.path} ends before byte {offset + size}; write it again")
        return data

    def _open_tar(self) -> tarfile.TarFile:
        if self.path.suffix == GZIP_SUFFIX:
            return tarfile.open(fileobj=io.BytesIO(self._decompressed()), mode="r:")
        return tarfile.open(self.path, mode="r:")

    def _decompressed(self) -> bytes:
        if self._memory is None:
            try:
                self._memory = gzip.decompress(self.path.read_bytes())
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise UserError(f"{self.path} is truncated or not gzip: {error}") from error
        return self._memory

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file and the memory behind: another process opens its own."""
        return {**self.__dict__, "_descriptor": None, "_closer": None, "_memory": None}

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._closer is not None:
            self._closer()
        self._descriptor = self._closer = None
