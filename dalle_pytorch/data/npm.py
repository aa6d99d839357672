"""The npm packages emoji come from: exact versions, fetched with npm, checked by SHA-256."""

import json
import logging
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dalle_pytorch.errors import UserError
from dalle_pytorch.files import sha256_file

log = logging.getLogger(__name__)


class Package(NamedTuple):
    """One npm package: its name, exact version, and the SHA-256 of its tarball."""

    name: str
    version: str
    sha256: str

    def read(self, packages: Path, file: str) -> bytes:
        """Read one file of the unpacked package.

        Args:
            packages: folder of unpacked packages.
            file: path inside the package.

        Raises:
            FileNotFoundError: the package or the file is missing.
            ValueError: it is another version.
        """
        folder = packages / self.name
        if not (folder / "package.json").is_file():
            raise FileNotFoundError(
                f"no package {folder}: unpack the tarball of `npm pack {self.name}@{self.version}` "
                "there, or leave packages=null to fetch it with npm"
            )
        version = json.loads((folder / "package.json").read_bytes())["version"]
        if version != self.version:
            raise UserError(f"{folder} is version {version}, but {self.version} is needed")
        return (folder / file).read_bytes()


class IconSet(NamedTuple):
    """One set of icons.

    Attributes:
        package: where its drawings are.
        phrase: how captions name it.
        licence: SPDX identifier.
        codes_from: the package whose list of code points holds for its names; None if no package has one.
        known_only: leave out what emojibase does not know by name: the set's own names of held-out things could not be
            told from those of new ones.
    """

    package: Package
    phrase: str
    licence: str
    codes_from: Package | None
    known_only: bool = False

    def codes(self, packages: Path) -> dict[str, str]:
        """Return icon name -> code points (hexadecimal, joined by "-")."""
        if self.codes_from is None:
            return {}
        listed = json.loads(self.codes_from.read(packages, "chars.json"))
        codes: dict[str, str] = {}
        for code, name in sorted(listed.items()):
            codes.setdefault(name, code)
        return codes

    def drawings(self, packages: Path) -> Iterator[tuple[str, str]]:
        """Yield (icon name, SVG document), sorted by name.

        Icons marked hidden are old drawings of something that the set draws anew, and are left out. An alias is
        drawn only if it is mirrored or turned; else it is but another name.
        """
        data = json.loads(self.package.read(packages, "icons.json"))
        icons = {name: icon for name, icon in data["icons"].items() if not icon.get("hidden")}
        for name, alias in data.get("aliases", {}).items():
            changes = alias.keys() - {"parent", "hidden"}
            if changes and not alias.get("hidden"):
                if changes != {"hFlip"}:
                    raise UserError(f"alias {name!r} of {self.package.name} has {sorted(changes)}")
                icons[name] = {**data["icons"][alias["parent"]], "hFlip": True}
        for name in sorted(icons):
            yield name, _svg(icons[name], data["width"], data["height"])


def _svg(icon: dict[str, Any], width: float | int, height: float | int) -> str:
    width, height = icon.get("width", width), icon.get("height", height)
    body = icon["body"]
    if icon.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
    )


def _package(name: str, version: str, sha256: str) -> Package:
    return Package(f"@iconify-json/{name}", version, sha256)


LABELS = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
_NOTO = _package("noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad")
_FLUENT = _package("fluent-emoji", "1.2.7", "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b")
_FLAT = _package("fluent-emoji-flat", "1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175")
_TWEMOJI = _package("twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7")
_OPENMOJI = _package("openmoji", "1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5")
_EMOJIONE = _package("emojione", "1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e")
_NOTO_V1 = _package("noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37")
_FXEMOJI = _package("fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef")

SETS = {
    "noto": IconSet(_NOTO, "noto emoji", "Apache-2.0", _NOTO),
    # The same names as the flat set, but its package lists no code points. Microsoft calls this drawing
    # "Color"; it is shaded, where the other is flat.
    "fluent": IconSet(_FLUENT, "fluent 3d emoji", "MIT", _FLAT),
    "fluent-flat": IconSet(_FLAT, "fluent flat emoji", "MIT", _FLAT),
    "twemoji": IconSet(_TWEMOJI, "twemoji", "CC-BY-4.0", _TWEMOJI),
    "openmoji": IconSet(_OPENMOJI, "openmoji", "CC-BY-SA-4.0", _OPENMOJI),
    "emojione": IconSet(_EMOJIONE, "emojione", "CC-BY-4.0", None),
    # Noto's drawings up to 2017, people as blobs, and Firefox OS'. Neither package lists code points: Noto's names are
    # those of today, Firefox OS' are Unicode's without spaces.
    "noto-v1": IconSet(_NOTO_V1, "noto blob emoji", "Apache-2.0", _NOTO, known_only=True),
    "fxemoji": IconSet(_FXEMOJI, "firefox os emoji", "Apache-2.0", None, known_only=True),
}


def packages_of(styles: Sequence[str]) -> list[Package]:
    """Return the packages that some styles need, each once."""
    sets = [SETS[style] for style in styles]
    needed = [LABELS, *(s.package for s in sets), *(s.codes_from for s in sets if s.codes_from)]
    return list(dict.fromkeys(needed))


def fetch_packages(packages: Sequence[Package], cache: Path) -> Path:
    """Fetch packages with npm and unpack them; what is there already is kept.

    Args:
        packages: what to fetch.
        cache: folder that holds ``<package name>/package.json`` afterwards.

    Returns:
        `cache`.

    Raises:
        FileNotFoundError: npm is not installed.
        ValueError: npm failed, or a tarball does not have the known SHA-256.
    """
    for package in packages:
        folder = cache / package.name
        marker = folder / ".complete"
        if marker.is_file() and marker.read_text() == package.sha256:
            continue
        log.info("fetching %s@%s", package.name, package.version)
        tarball = _npm_pack(package, cache)
        if (found := sha256_file(tarball)) != package.sha256:
            raise UserError(f"{tarball} has SHA-256 {found}, but {package.sha256} is expected")
        with tarfile.open(tarball) as tar:
            for member in tar.getmembers():
                # npm puts everything below "package/"
                member.name = member.name.partition("/")[2]
                tar.extract(member, folder, filter="data")
        marker.write_text(package.sha256)
    return cache


def _npm_pack(package: Package, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    wanted = f"{package.name}@{package.version}"
    mend = "or unpack the npm packages into a folder yourself and pass packages=FOLDER"
    command = ["npm", "pack", wanted, "--json", "--pack-destination", str(cache.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"npm is not installed, so {wanted} cannot be fetched: install Node.js, {mend}"
        ) from error
    if done.returncode != 0:
        raise UserError(f"`npm pack {wanted}` failed, {mend}:\n{done.stderr.strip()}")
    return cache / json.loads(done.stdout)[0]["filename"]
