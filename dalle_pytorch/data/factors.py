"""What a picture shows, by the name of a factor, and what a caption says of it; captions that differ in one factor.

The one place that knows the grammars of our captions:

- emoji: "style" and "concept". Every caption names the concept; only some the style, by its phrase ("noto emoji").
- rainbow: the six factors of a `Drawing`. A caption leaves plain choices out, and so asks for them too. "rotation" is
  what can be seen of it: a shape that looks the same after some turns is taken as turned the least, one that looks the
  same after every turn has none.
- other data: "concept" and "style" of a sample's JSON, or its "factors", a dict of text. A caption tells those whose
  words stand in it.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dalle_pytorch.data.npm import SETS
from dalle_pytorch.data.rainbow import COLOURS, FILLS, ROTATIONS, SHAPES, SIZES, TEXTURES, Drawing, turned
from dalle_pytorch.errors import UserError

Factors: TypeAlias = dict[str, str]
"""Value of each factor; those that a picture has not, or a caption does not tell, are absent."""

CONTEXTS = 64
"""Pictures whose captions are rewritten, for the classes of rainbow: more change no mean over them much."""
RAINBOW = {
    "size": SIZES,
    "fill": FILLS,
    "texture": TEXTURES,
    "colour": COLOURS,
    "shape": SHAPES,
    "rotation": ROTATIONS,
}


def factors_of(meta: Mapping[str, Any]) -> Factors:
    """What a picture shows; empty where its data know no factors.

    Args:
        meta: JSON of the sample.

    Raises:
        ValueError: a factor that is not text; names it.
    """
    given = meta.get("factors")
    if given is None:
        given = {name: meta[name] for name in ("style", "concept") if meta.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise UserError(
                f"factor {name!r} of the sample with the caption {meta['captions'][0]!r} is {value!r}, no text"
            )
    return _visible(Drawing(**given)) if _is_rainbow(given) else dict(given)


def asked(meta: Mapping[str, Any], caption: str) -> Factors:
    """The factors of a picture that one of its captions tells.

    Raises:
        ValueError: a factor that is not text; names it.
    """
    found = factors_of(meta)
    if _is_rainbow(meta.get("factors")):
        return found
    if _is_emoji(meta):
        return {name: value for name, value in found.items() if name != "style" or SETS[value].phrase in caption}
    return {name: value for name, value in found.items() if value and value.casefold() in caption.casefold()}


def factor_classes(metas: Iterable[Mapping[str, Any]], min_pictures: int) -> dict[str, list[str]]:
    """The values of each factor that have enough pictures, in order; factors with fewer than two of them are left out.

    Args:
        metas: JSON of all samples.
        min_pictures: how many are enough.
    """
    counts: dict[str, Counter[str]] = {}
    for meta in metas:
        for name, value in factors_of(meta).items():
            counts.setdefault(name, Counter())[value] += 1
    enough = {name: sorted(v for v, n in values.items() if n >= min_pictures) for name, values in counts.items()}
    return {name: values for name, values in enough.items() if len(values) > 1}


def class_captions(metas: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """The captions that stand for each value of each factor, alike in all else: factor -> value -> captions.

    Emoji: "NAME, STYLE" for every name and every style of these samples; a concept has its own name with every style
    and alone, a style every name with its own. Rainbow: the captions of CONTEXTS of these pictures, with another value
    of the factor. Other data: the first caption of each concept, no other factor.
    """
    if _is_rainbow(metas[0].get("factors")):
        return _rainbow_captions(metas)
    names = {meta["concept"]: meta["captions"][0] for meta in reversed(metas) if meta.get("concept") is not None}
    names = dict(sorted(names.items()))
    if not all(_is_emoji(meta) for meta in metas):
        return {"concept": {concept: [name] for concept, name in names.items()}} if names else {}
    phrases = {style: SETS[style].phrase for style in sorted({meta["style"] for meta in metas})}
    return {
        "style": {style: [f"{name}, {words}" for name in names.values()] for style, words in phrases.items()},
        "concept": {
            concept: [name, *(f"{name}, {words}" for words in phrases.values())] for concept, name in names.items()
        },
    }


def _rainbow_captions(metas: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    step = -(-len(metas) // CONTEXTS)
    drawings = [Drawing(**meta["factors"]) for meta in metas[::step]]
    seen = {name: {found[name] for meta in metas if name in (found := factors_of(meta))} for name in RAINBOW}
    return {
        name: {
            value: list(dict.fromkeys(drawing._replace(**{name: value}).caption for drawing in drawings))
            for value in values
            if value in seen[name]
        }
        for name, values in RAINBOW.items()
    }


def _is_rainbow(factors: Any) -> bool:
    return isinstance(factors, Mapping) and set(factors) == set(Drawing._fields)


def _is_emoji(meta: Mapping[str, Any]) -> bool:
    return meta.get("concept") is not None and meta.get("style") in SETS and meta.get("factors") is None


def _visible(drawing: Drawing) -> Factors:
    """The factors of a drawing, with the first rotation that looks like its own; without, if all look alike."""
    covers = {name: turned(drawing._replace(rotation=name)) for name in ROTATIONS}
    alike = [name for name, cover in covers.items() if np.array_equal(cover, covers[drawing.rotation])]
    found = drawing._asdict()
    if len(alike) == len(ROTATIONS):
        del found["rotation"]
    else:
        found["rotation"] = alike[0]
    return found
