"""Settings of serve.py and dalle-worker."""

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from dalle_pytorch.errors import UserError, at_least_one, finite
from dalle_pytorch.generation.sampling import SamplingConfig


@dataclass(kw_only=True)
class LimitsConfig:
    """What a server takes from a client."""

    images: int = 64
    """Candidates that a job may draw."""
    prompt: int = 1000
    """Characters of a prompt."""
    queued: int = 1000
    """Jobs that may wait; further ones are answered with 429."""
    owned: int = 100
    """Jobs of one person that may wait."""
    hourly: int | None = None
    """Images that one person may ask for within an hour, candidates counted; null = any number."""
    body_mb: float = 16.0
    """Bytes of a request, in 10^6."""
    pixels: int = 4096 * 4096
    """Pixels of an uploaded image."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a limit below 1; names it.
        """
        finite(self)
        at_least_one(self, "images", "prompt", "queued", "owned", "pixels")
        if self.hourly is not None:
            at_least_one(self, "hourly")
        if self.body_mb <= 0:
            raise UserError(f"body_mb must be positive, got {self.body_mb}")


@dataclass(kw_only=True)
class ServeConfig:
    """A server: where it listens, what it draws with, where images and jobs are kept."""

    host: str = "127.0.0.1"
    """Address to listen on. Others than this machine's own need keys."""
    port: int = 8000
    """Port to listen on."""
    names: list[str] = field(default_factory=list)
    """Host names by which clients reach the server, beside host and localhost; requests for others are refused, which
    keeps pages of strangers from reaching a server on this machine."""
    origins: list[str] = field(default_factory=list)
    """Origins of other pages that may use the API from a browser, as https://example.org; none by default."""
    tls_cert: str | None = None
    """Certificate file; with tls_key the server speaks HTTPS."""
    tls_key: str | None = None
    """Key file of the certificate."""
    keys: str | None = None
    """File of keys, a line each: a name, a colon, the key's SHA-256 in hexadecimal. Null = no keys are asked for."""
    admins: list[str] = field(default_factory=list)
    """Names in keys that may pause the queue; without keys everyone may."""
    weights: str = "emoji"
    """The DALLE: a file, a folder, the name of a release or an id of the hub, as for generate.py."""
    clip: str | None = None
    """The CLIP that ranks; several with | between them; null = nothing ranks."""
    vae: str | None = None
    """The image tokenizer of the codec's routes: a file or a name, such as openai_dvae; null = the DALLE's own."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How images are drawn where a request does not say."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1", ..."""
    precision: str | None = None
    """As for generate.py."""
    memory_gb: float | None = None
    """As for generate.py."""
    together: int = 64
    """Images of one or several jobs that are drawn in one go."""
    library: str = "runs/library"
    """Folder of the images, and of the ledger unless database says another place."""
    database: str | None = None
    """SQLAlchemy's URL of the ledger, as postgresql+psycopg://user@host/name; null = a SQLite file in library."""
    workers: int = 1
    """Workers in the server's process, 1 or 0; 0 where dalle-worker runs elsewhere."""
    lease: float = 15.0
    """Seconds until the job of a dead worker is queued again."""
    repair: bool = False
    """Only bring ledger and files of the library together again, and say what was mended."""
    import_library: str | None = None
    """Only copy the library of a playground into this one; serve.py import-library PATH says the same."""
    owner: str | None = None
    """Only with import_library, on a server with keys: the name whose images those will be."""
    inspiration: str | None = None
    """Text file with parts of prompts for the page that puts them together (docs/serving.md); null = one for emoji."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """What a client may ask for."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: settings out of range, half of a certificate, or an open server without keys.
        """
        finite(self)
        at_least_one(self, "together")
        if self.workers not in (0, 1):
            raise UserError(f"workers must be 0 or 1, got {self.workers}: start dalle-worker for each further one")
        if self.lease < 1:
            raise UserError(f"lease must be at least 1 second, got {self.lease}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UserError("tls_cert and tls_key belong together: give both")
        if self.owner is not None and (self.import_library is None or self.keys is None):
            raise UserError("owner belongs to import_library on a server with keys")
        if self.import_library is not None and self.keys is not None and self.owner is None:
            raise UserError("import_library with keys: say owner=NAME, whose images these are, or nobody sees them")
        if not self.is_local() and self.keys is None:
            raise UserError(
                f"host={self.host} lets other machines in: give keys=FILE (docs/serving.md says how to make one), or "
                "listen on 127.0.0.1"
            )

    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def database_url(self) -> str:
        """Where the ledger is."""
        return self.database or f"sqlite:///{(Path(self.library) / 'ledger.sqlite').absolute()}"
