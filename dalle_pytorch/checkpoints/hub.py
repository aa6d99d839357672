"""Released weights by name: those that come along, and those that are downloaded once and then read from the cache."""

import hashlib
import logging
import re
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dalle_pytorch.errors import UserError, first_line
from dalle_pytorch.files import atomic, sha256_file
from dalle_pytorch.text.bart import PACKAGES, require

log = logging.getLogger(__name__)

NetworkError = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
"""Of the HTTP library that huggingface_hub is built on: httpx before its version 2, then httpx2."""

PLACES = (Path(__file__).parents[1] / "weights", Path(__file__).parents[2] / "weights")
"""Where weights lie that come along: in a wheel, and in a checkout, which an editable installation reads."""
SUMS = "SHA256SUMS"
"""What the bytes of those are (``sha256sum --check SHA256SUMS``)."""
CACHE = Path("~/.cache/dalle_pytorch").expanduser()
"""Where files come to lie that are not on the hub."""


class Release(NamedTuple):
    """Where a set of weights is, and what reads it."""

    source: str | None
    """Name in ``sources.SOURCES``; None = checkpoints of ours."""
    repo: str | None = None
    """Repository of the Hugging Face hub."""
    files: tuple[str, ...] = ()
    """Files of the repository that are needed; all where empty."""
    urls: tuple[tuple[str, str, str], ...] = ()
    """Or files elsewhere: name, address, the first digits of its SHA-256 or ""."""
    options: Mapping[str, Any] = MappingProxyType({})
    """What the importer is told beyond the path; a Path is one in the folder."""
    path: str = ""
    """The file of the folder that the importer takes; the folder itself where empty."""
    packages: tuple[str, ...] = ()
    """Optional packages that the model needs."""
    bundled: bool = False
    """Whether it comes with the package, in one of PLACES: a file for each kind, and their SHA256SUMS."""

    def told(self, folder: Path) -> dict[str, Any]:
        """The options, for files that lie in a folder."""
        return {name: folder / value if isinstance(value, Path) else value for name, value in self.options.items()}


MIN_DALLE = "kuprel/min-dalle"
RELEASES: dict[str, Release] = {
    "emoji": Release(None, bundled=True),
    "openai_dvae": Release(
        "openai_dvae",
        urls=(  # OpenAI publishes no hashes of these
            ("encoder.pkl", "https://cdn.openai.com/dall-e/encoder.pkl", ""),
            ("decoder.pkl", "https://cdn.openai.com/dall-e/decoder.pkl", ""),
        ),
    ),
    "vqgan_f16_1024": Release(
        "taming",
        urls=(
            ("vqgan.ckpt", "https://heibox.uni-heidelberg.de/f/140747ba53464f49b476/?dl=1", ""),
            ("vqgan.yaml", "https://heibox.uni-heidelberg.de/f/6ecf2af6c658432c8298/?dl=1", ""),
        ),
        options={"config": Path("vqgan.yaml")},
        path="vqgan.ckpt",
    ),
    "dalle_mini": Release(
        "min_dalle",
        MIN_DALLE,
        ("encoder_mini.pt", "decoder_mini.pt", "vocab_mini.json", "merges_mini.txt", "detoker.pt"),
        options={"mega": False},  # both lie in one folder of the cache
        packages=PACKAGES["min_dalle"],
    ),
    "dalle_mega": Release(
        "min_dalle",
        MIN_DALLE,
        ("encoder.pt", "decoder.pt", "vocab.json", "merges.txt", "detoker.pt"),
        options={"mega": True},
        packages=PACKAGES["min_dalle"],
    ),
    "clip_vit_b32": Release(
        "openai_clip",
        urls=(
            (
                "ViT-B-32.pt",
                "https://openaipublic.azureedge.net/clip/models/"
                "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
                "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
            ),
        ),
        path="ViT-B-32.pt",
    ),
}  # fmt: skip
"""What ``dalle_pytorch.load`` knows by name; anything else on the hub goes by its id."""


UNREAD = ("*.h5", "*.ot", "*.onnx", "*.tflite", "*.mlpackage/*", "onnx/*", "openvino/*", "coreml/*")
"""Files of a repository that no importer reads."""
TWICE = ("pytorch_model*", "flax_model*")
"""The same weights again, where transformers' safetensors are there."""
SUFFIXES = (".bin", ".ckpt", ".msgpack", ".pkl", ".pt", ".pth", ".safetensors")
"""Of files: a name that ends so is no id of the hub."""


def is_hub_id(name: str) -> bool:
    """Whether a text can be an id of the hub, ``owner/name``, perhaps with ``@revision``."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) is not None
    return is_id and not name.startswith((".", "/")) and not name.endswith(SUFFIXES)


def fetch(name: str, kind: str | None = None) -> Path:
    """The folder of released weights, downloaded unless it is there already; of bundled ones a file of it.

    Broken-off downloads go on where they stopped (hub only). ``HF_HUB_OFFLINE=1`` never asks the network.

    Args:
        name: one of RELEASES, or an id of the hub: ``owner/name`` or ``owner/name@revision``.
        kind: "vae", "dalle" or "clip": which of bundled weights; None = the DALLE, which carries its tokenizers.

    Raises:
        FileNotFoundError: bundled weights that are not there; names them.
        UserError: no such name, repository or kind, a missing package, a file whose checksum is wrong, or no network;
            says which and the mend.
    """
    release = RELEASES.get(name)
    if release is not None:
        require(release.packages)
    if release is not None and release.bundled:
        return _bundled(name, f"{kind or 'dalle'}.safetensors")
    if release is not None and release.urls:
        folder = CACHE / name
        for file, url, digest in release.urls:
            _download(url, folder / file, digest)
        return folder
    repo, _, revision = (name if release is None else str(release.repo)).partition("@")
    return _snapshot(repo, revision or None, list(release.files) if release is not None else None)


def bundled_folder(name: str) -> Path:
    """Where bundled weights lie.

    Raises:
        FileNotFoundError: this installation came without them.
    """
    for place in PLACES:
        if (place / name / SUMS).is_file():
            return place / name
    raise FileNotFoundError(
        f"the weights {name} did not come with this installation: install the wheel, or pip install -e a clone of the "
        "repository, which has them in weights/; or name other weights"
    )


def _bundled(name: str, file: str) -> Path:
    """A file of bundled weights, its bytes checked."""
    path = bundled_folder(name) / file
    lines = (path.parent / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {file: digest for digest, file in (line.split(maxsplit=1) for line in lines)}
    if file not in sums:
        raise UserError(f"the release {name} has no {path.stem}: it has {', '.join(sorted(sums))}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: git checkout it, or install the package again")
    if sha256_file(path) != sums[file]:
        raise UserError(f"{path} is damaged, {SUMS} says other bytes: git checkout it, or install the package again")
    return path


def _snapshot(repo: str, revision: str | None, files: list[str] | None) -> Path:
    wanted: dict[str, Any] = {"revision": revision, "allow_patterns": files}
    at = f"{repo}@{revision}" if revision else repo
    try:
        for ignored in ([*UNREAD, *TWICE], [*UNREAD]):
            folder = Path(snapshot_download(repo, **wanted, ignore_patterns=ignored, local_files_only=True))
            if ignored == _ignored([file.name for file in folder.iterdir()]):
                return folder
    except (LocalEntryNotFoundError, HFValidationError):
        log.info("%s is not in the cache: downloading", repo)
    try:
        ignored = _ignored(HfApi().list_repo_files(repo, revision=revision))
        folder = Path(snapshot_download(repo, **wanted, ignore_patterns=ignored))
        found = HfApi().verify_repo_checksums(repo, revision=folder.name)
    except HFValidationError as error:
        raise UserError(f"no file or folder {at} here, and it is no id of the hub: {first_line(error)}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"no file or folder {at} here, and {repo} on the hub has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no file or folder {at} here, and {repo} is not on the hub, or private: set HF_TOKEN to read a private one"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, NetworkError, OSError) as error:
        raise UserError(
            f"no file or folder {at} here, and {repo} is not in the cache, and the hub cannot be reached "
            f"({first_line(error)}); try again, or download it where there is a network, and give the folder in place "
            "of the name"
        ) from error
    if found.mismatches:
        names = ", ".join(str(mismatch["path"]) for mismatch in found.mismatches)
        # the snapshot has links only; the files lie beside it
        raise UserError(f"{repo}: the checksum of {names} is wrong; delete {folder.parent.parent} and try again")
    return folder


def _ignored(names: list[str]) -> list[str]:
    """Patterns of the files that are not needed of these."""
    twice = {"model.safetensors", "model.safetensors.index.json"} & set(names)
    return [*UNREAD, *TWICE] if twice else [*UNREAD]


def _download(url: str, path: Path, digest: str) -> None:
    """One file from an address, unless it is there; whole or not at all."""
    if path.is_file():
        return
    log.info("downloading %s to %s", url, path)
    done, sums = 0, hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, atomic(path) as temporary:
            length = answer.headers.get("Content-Length")
            with temporary.open("wb") as file:
                while block := answer.read(1 << 20):
                    file.write(block)
                    sums.update(block)
                    done += len(block)
            if length is not None and done != int(length):
                raise UserError(f"{url} broke off after {done} of {length} bytes; try again")
            if not sums.hexdigest().startswith(digest):
                raise UserError(f"{url} has another hash ({sums.hexdigest()}) than was published; try again")
    except (OSError, HTTPException) as error:
        raise UserError(
            f"{url} cannot be reached ({first_line(error)}); download it where there is a network, put it at {path}, "
            "or give your file in place of the name"
        ) from error
