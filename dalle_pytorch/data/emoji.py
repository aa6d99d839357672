"""Emoji as captioned pictures: rendered from the icon sets' SVGs, captioned from emojibase, split by hash.

npm packages ──icons──▶ Emoji (concept, family) ──split, render──▶ image shards
"""

import hashlib
import json
import logging
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from PIL import features

from dalle_pytorch.data.emoji_names import Emoji, EmojiNames, slug
from dalle_pytorch.data.index import hash_share
from dalle_pytorch.data.npm import LABELS, SETS, IconSet, packages_of
from dalle_pytorch.data.shards import ShardWriter
from dalle_pytorch.data.svg import encode_webp, render, resvg
from dalle_pytorch.errors import UserError

log = logging.getLogger(__name__)

DEFAULT_STYLES = ("noto", "fluent", "fluent-flat")
# Shares of the pictures held out: whole concepts; pairs of concept and style, to report with and to choose with.
TEST_CONCEPT, TEST_COMPOSE, VAL = 0.05, 0.05, 0.04

_AFTER_NOUN = re.compile(r" (?:with|of|on|in|at|for|to|and|facing|showing|without) ")
_WORDS = re.compile(r"[a-z][a-z' -]*")  # no "<3" and no "7:30"


class Icon(NamedTuple):
    """One drawing of one thing: its set, the thing, and the SVG."""

    style: str
    emoji: Emoji
    svg: str

    @property
    def key(self) -> str:
        """The sample key, unique by construction: a set draws a thing once."""
        return f"{slug(self.emoji.concept)}_{self.style}"


def read_icons(packages: Path, styles: Sequence[str] = DEFAULT_STYLES, *, skin_tones: bool = False) -> list[Icon]:
    """Read the drawings of several sets.

    Args:
        packages: folder of unpacked npm packages, ``<packages>/<package name>/package.json``.
        styles: names of `SETS`.
        skin_tones: take the variants by skin tone too.

    Returns:
        The icons in a fixed order: by set, then by the set's own name.

    Raises:
        FileNotFoundError: a package is missing.
        ValueError: an unknown style, or a package of another version.
    """
    if unknown := [style for style in styles if style not in SETS]:
        raise UserError(f"unknown styles {unknown}; there are: {', '.join(SETS)}")
    if not styles or len(set(styles)) != len(styles):
        raise UserError(f"styles must be one or more names, each once, got {list(styles)}")
    names = EmojiNames(json.loads(LABELS.read(packages, "en/data.json")))
    icons: list[Icon] = []
    for style in styles:
        taken = list(_icons_of_set(packages, SETS[style], style, names, skin_tones))
        unknown_things = [icon.emoji.concept for icon in taken if not icon.emoji.known]
        log.info("%s: %d icons, %d not in emojibase", style, len(taken), len(unknown_things))
        icons += taken
    return icons


def _icons_of_set(packages: Path, icon_set: IconSet, style: str, names: EmojiNames, skin_tones: bool) -> Iterator[Icon]:
    codes = icon_set.codes(packages)
    seen: dict[str, str] = {}
    for name, svg in icon_set.drawings(packages):
        emoji = names.look_up(name, codes.get(name))
        if (emoji.tones and not skin_tones) or (icon_set.known_only and not emoji.known):
            continue
        if emoji.concept in seen:
            log.info("%s: %s is %s again, left out", style, name, seen[emoji.concept])
            continue
        seen[emoji.concept] = name
        yield Icon(style, emoji, svg)


def assign_splits(icons: Iterable[Icon], families: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """Give every (concept, style) its split; a pure function of the names.

    ``test_concept`` holds whole families (a concept with its variants of gender, direction and skin tone), so
    nothing like them is ever trained on. ``test_compose`` and ``val`` hold single pictures whose concept is trained
    on in another style: the same kind of picture, one to report with and one to choose with. A concept keeps at
    least one style in ``train``.

    Args:
        icons: all icons.
        families: concept -> family, from `merge_families`.

    Returns:
        (concept, style) -> "train", "val", "test_concept" or "test_compose".
    """
    styles: dict[str, list[str]] = defaultdict(list)
    for icon in icons:
        styles[icon.emoji.concept].append(icon.style)
    splits: dict[tuple[str, str], str] = {}
    for concept, drawn in styles.items():
        if hash_share(families[concept]) < TEST_CONCEPT:
            splits.update(((concept, style), "test_concept") for style in drawn)
            continue
        # From the surest in training to the surest held out.
        shares = sorted(((hash_share(f"{concept}|{style}"), style) for style in drawn), reverse=True)
        for rank, (share, style) in enumerate(shares):
            split = "train"
            if rank > 0 and share < TEST_COMPOSE:
                split = "test_compose"
            elif rank > 0 and share < TEST_COMPOSE + VAL:
                split = "val"
            splits[concept, style] = split
    return splits


def merge_families(icons: Iterable[Icon], pixels: Iterable[str]) -> dict[str, str]:
    """Join the families of concepts which some set draws alike, pixel for pixel.

    Args:
        icons: all icons.
        pixels: a digest of each icon's pixels.

    Returns:
        concept -> family.
    """
    icons = list(icons)
    parent = {icon.emoji.family: icon.emoji.family for icon in icons}

    def root(family: str) -> str:
        while parent[family] != family:
            family = parent[family]
        return family

    first: dict[str, str] = {}
    for icon, digest in zip(icons, pixels, strict=True):
        one, other = sorted((root(first.setdefault(digest, icon.emoji.family)), root(icon.emoji.family)))
        parent[other] = one
    return {icon.emoji.concept: root(icon.emoji.family) for icon in icons}


def captions(emoji: Emoji, style: str) -> list[str]:
    """Write the captions of an icon: its name, with the style, and with key words.

    Args:
        emoji: the thing.
        style: the set's name.

    Returns:
        Distinct captions, the plain name first.
    """
    name, words = emoji.name, SETS[style].phrase
    told = set(slug(name).split("-"))
    tags = [tag for tag in emoji.tags if _WORDS.fullmatch(tag) and not told & set(slug(tag).split("-"))][:3]
    lines = [name, f"{name}, {words}"]
    lines.append(f"{_article(name)} {name}" if _countable(name) else f"{words} of {name}")
    if tags:
        lines.append(f"{name}, {', '.join(tags)}")
        lines.append(f"{', '.join(tags)}: {name}, {words}")
    return list(dict.fromkeys(lines))


def _countable(name: str) -> bool:
    """Guess whether "a" fits before a name; wrong at times, as people's captions are."""
    words = _AFTER_NOUN.split(name)[0].split()
    if words[0] in ("man", "woman", "person"):
        return True
    plural = words[-1].endswith("s") and not words[-1].endswith(("ss", "us", "is", "as"))
    many = {"people", "men", "women"} & set(words)
    time = words[-1].endswith(("o'clock", "-thirty"))
    return words[0].islower() and not (plural or many or time or words[-1].isdigit())


def _article(name: str) -> str:
    # "a unicorn", "a one-piece": vowels by letter, consonants by sound.
    vowel = name[0] in "aeiou" and not name.startswith(("uni", "one", "eu", "ufo"))
    return "an" if vowel else "a"


def _render_webp(job: tuple[str, int]) -> tuple[bytes, str]:
    image = render(*job)
    return encode_webp(image), hashlib.sha256(image.tobytes()).hexdigest()


def pack_emoji(
    packages: Path,
    out: Path,
    *,
    styles: Sequence[str] = DEFAULT_STYLES,
    skin_tones: bool = False,
    image_size: int = 64,
    samples_per_shard: int = 1000,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write the emoji shards.

    Args:
        packages: folder of unpacked npm packages (see `fetch_packages`).
        out: shard folder to write; absent or empty.
        styles: names of `SETS`.
        skin_tones: take the variants by skin tone too.
        image_size: side of the pictures in pixels.
        samples_per_shard: the most samples in one tar.
        workers: processes that render; None for one per core. The result does not depend on it.

    Returns:
        The index written.
    """
    icons = read_icons(packages, styles, skin_tones=skin_tones)
    # The order mixes styles and things, and does not depend on the sets' own order.
    icons.sort(key=lambda icon: (hash_share(icon.key), icon.key))
    writer = ShardWriter(
        out,
        name="emoji",
        image_size=image_size,
        samples_per_shard=samples_per_shard,
        compress=True,
        source=_source(styles, skin_tones),
    )
    with writer:
        pack_icons(writer, icons, image_size=image_size, workers=workers)
    return writer.index()


def pack_icons(writer: ShardWriter, icons: Sequence[Icon], *, image_size: int, workers: int | None = None) -> None:
    """Render, split and write icons in the order given.

    Args:
        writer: an open writer.
        icons: what to draw.
        image_size: side of the pictures in pixels.
        workers: processes that render; None for one per core, 1 for none besides this one.
    """
    jobs = [(icon.svg, image_size) for icon in icons]
    if workers == 1:
        drawn = [_render_webp(job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers or os.cpu_count()) as pool:
            drawn = list(pool.map(_render_webp, jobs, chunksize=16))
    families = merge_families(icons, (digest for _, digest in drawn))
    splits = assign_splits(icons, families)
    for icon, (image, _) in zip(icons, drawn, strict=True):
        emoji = icon.emoji
        meta = {
            "captions": captions(emoji, icon.style),
            "concept": emoji.concept,
            "style": icon.style,
            "family": families[emoji.concept],
        }
        writer.write(splits[emoji.concept, icon.style], icon.key, image, "webp", meta)


def _source(styles: Sequence[str], skin_tones: bool) -> dict[str, Any]:
    """Say what the bytes depend on: the packages, and the programs that draw and compress."""
    return {
        "packages": {package.name: package.version for package in packages_of(styles)},
        "styles": list(styles),
        "skin_tones": skin_tones,
        "programs": {
            "resvg_py": resvg().__version__,
            "pillow": PIL.__version__,
            "libwebp": features.version("webp"),
            "zlib": zlib.ZLIB_RUNTIME_VERSION,
        },
    }
