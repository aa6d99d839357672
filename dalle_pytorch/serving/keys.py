"""Bearer keys: who may use a server, and whose a job is."""

import hashlib
import hmac
import re
from pathlib import Path

from dalle_pytorch.errors import UserError
from dalle_pytorch.files import read_text

LINE = re.compile(r"(?P<name>[\w.@-]{1,100}):(?P<digest>[0-9a-f]{64})")
ANYONE = "anyone"
"""Owner of everything where no keys are asked for."""


class Keys:
    """Names and hashes of keys; keys themselves are never kept.

    Args:
        file: as ``ServeConfig.keys``; None = everyone is ``ANYONE``.

    Raises:
        UserError: a line of the file is none of a key; names it.
    """

    def __init__(self, file: str | None) -> None:
        self.digests: list[tuple[str, bytes]] | None = None
        if file is None:
            return
        self.digests = []
        for number, line in enumerate(read_text(Path(file), f"keys={file}").splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            found = LINE.fullmatch(line.strip())
            if found is None:
                raise UserError(
                    f"keys={file}, line {number}: it must be NAME:SHA256, the hash in 64 hexadecimal digits"
                )
            if found["name"] == ANYONE:
                raise UserError(
                    f"keys={file}, line {number}: {ANYONE} is the name of those without a key; take another"
                )
            self.digests.append((found["name"], bytes.fromhex(found["digest"])))  # a name may have several keys

    def owner(self, authorization: str | None) -> str | None:
        """Whose key a header ``Authorization: Bearer KEY`` holds; None = nobody's. All keys are compared, each in the
        same time, so that the time tells nothing."""
        if self.digests is None:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        digest, owner = hashlib.sha256(key.encode("latin-1")).digest(), None  # as headers are decoded
        for name, known in self.digests:
            if hmac.compare_digest(digest, known) and scheme.lower() == "bearer":
                owner = name
        return owner
