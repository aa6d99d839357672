"""Weights that come with the package, by name: ``dalle_pytorch.load("emoji")``.

They lie in ``weights/<name>/`` of the repository, and in the wheel beside this file. ``SHA256SUMS`` there says what
their bytes are (``sha256sum --check SHA256SUMS``).
"""

from pathlib import Path

from dalle_pytorch.errors import UserError
from dalle_pytorch.files import sha256_file

NAMES = ("emoji",)
SUMS = "SHA256SUMS"
PLACES = (Path(__file__).parents[1] / "weights", Path(__file__).parents[2] / "weights")
"""In a wheel; in the repository, which an editable installation reads."""


def folder(name: str) -> Path:
    """Where a release lies.

    Args:
        name: one of NAMES.

    Raises:
        FileNotFoundError: this installation came without it.
    """
    for place in PLACES:
        if (place / name / SUMS).is_file():
            return place / name
    raise FileNotFoundError(
        f"the weights {name} did not come with this installation: install the wheel, or pip install -e a clone of the "
        "repository, which has them in weights/; or name other weights"
    )


def file(name: str, kind: str | None = None) -> Path:
    """A file of a release, its bytes checked.

    Args:
        name: one of NAMES.
        kind: "vae", "dalle" or "clip"; None = the DALLE, which carries its image and text tokenizers.

    Raises:
        FileNotFoundError: it is not there; names it.
        ValueError: the release has no such kind, or the file is damaged.
    """
    where = folder(name)
    lines = (where / SUMS).read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    wanted = f"{kind or 'dalle'}.safetensors"
    if wanted not in sums:
        raise UserError(f"the release {name} has no {kind}: it has {', '.join(sorted(sums))}")
    path = where / wanted
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: git checkout it, or install the package again")
    if sha256_file(path) != sums[wanted]:
        raise UserError(f"{path} is damaged, {SUMS} says other bytes: git checkout it, or install the package again")
    return path
