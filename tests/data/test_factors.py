"""What pictures show and captions tell: the grammars of emoji and rainbow, and other data's JSON."""

from collections import defaultdict

import numpy as np
import pytest

from dalle_pytorch.data.emoji import captions
from dalle_pytorch.data.emoji_names import Emoji
from dalle_pytorch.data.factors import CONTEXTS, asked, class_captions, factor_classes, factors_of
from dalle_pytorch.data.npm import SETS
from dalle_pytorch.data.rainbow import Drawing, all_drawings, draw


def emoji(concept, style):
    lines = captions(Emoji(concept, concept, concept, ("fruit", "noto emoji"), (), True), style)
    return {"captions": lines, "concept": concept, "style": style, "family": concept}


def rainbow(drawing):
    return {"captions": [drawing.caption], "concept": drawing.caption, "style": None, "factors": drawing._asdict()}


def test_every_emoji_caption_tells_the_concept_and_those_with_a_phrase_the_style():
    for style in SETS:
        meta = emoji("red apple", style)
        told = [asked(meta, caption) for caption in meta["captions"]]
        assert all(row["concept"] == "red apple" for row in told)
        assert told[0] == {"concept": "red apple"}
        assert told[1] == {"concept": "red apple", "style": style}
        for row, caption in zip(told, meta["captions"], strict=True):
            assert ("style" in row) == (SETS[style].phrase in caption)


def test_drawings_have_the_same_factors_where_they_look_the_same():
    """Of one size, fill, texture and colour: the others change neither shape nor rotation."""
    pictures = defaultdict(set)
    drawings = [d for d in all_drawings() if (d.size, d.fill, d.texture, d.colour) == ("large", "filled", "", "red")]
    assert len(drawings) == 32
    for drawing in drawings:
        pixels = np.asarray(draw(drawing)).tobytes()
        pictures[tuple(sorted(factors_of(rainbow(drawing)).items()))].add(pixels)
    assert all(len(pixels) == 1 for pixels in pictures.values())
    assert len(pictures) == len(set.union(*pictures.values())) == 18
    assert "rotation" not in factors_of(rainbow(Drawing("small", "", "", "red", "circle", "rotated twice")))
    twice = factors_of(rainbow(Drawing("small", "", "", "red", "rectangle", "rotated twice")))
    assert twice["rotation"] == ""


def test_a_rainbow_caption_asks_for_the_plain_choices_that_it_leaves_out():
    meta = rainbow(Drawing("small", "", "", "red", "triangle", ""))
    assert meta["captions"] == ["small red triangle"]
    assert asked(meta, meta["captions"][0]) == meta["factors"]


def test_other_data_tell_what_stands_in_the_caption():
    meta = {"captions": ["A Cat on a mat", "a pet"], "concept": "cat", "style": "photo"}
    assert factors_of(meta) == {"concept": "cat", "style": "photo"}
    assert asked(meta, "A Cat on a mat") == {"concept": "cat"}
    assert asked(meta, "a pet") == {}
    meta = {"captions": ["a blue wall"], "concept": None, "style": None, "factors": {"colour": "blue", "mood": ""}}
    assert asked(meta, "a blue wall") == {"colour": "blue"}
    assert factors_of({"captions": ["x"], "concept": None, "style": None}) == {}
    with pytest.raises(ValueError, match="factor 'n' of the sample with the caption 'x' is 3, no text"):
        factors_of({"captions": ["x"], "factors": {"n": 3}})


def test_classes_are_the_values_with_enough_pictures():
    metas = [emoji("b", "noto"), emoji("b", "fluent"), emoji("a", "noto"), emoji("a", "fluent"), emoji("c", "noto")]
    assert factor_classes(metas, 1) == {"style": ["fluent", "noto"], "concept": ["a", "b", "c"]}
    assert factor_classes(metas, 2) == {"style": ["fluent", "noto"], "concept": ["a", "b"]}
    assert factor_classes(metas, 3) == {}  # one style alone is no choice
    assert factor_classes([], 1) == {}


def test_class_captions_of_emoji_are_alike_in_all_else():
    metas = [emoji("red apple", "noto"), emoji("cat", "fluent"), emoji("cat", "noto")]
    found = class_captions(metas)
    assert found["style"] == {
        "fluent": ["cat, fluent 3d emoji", "red apple, fluent 3d emoji"],
        "noto": ["cat, noto emoji", "red apple, noto emoji"],
    }
    assert found["concept"]["cat"] == ["cat", "cat, fluent 3d emoji", "cat, noto emoji"]
    written = {line for meta in metas for line in meta["captions"]}
    assert {"cat, noto emoji", "cat, fluent 3d emoji", "red apple, noto emoji"} <= written


@pytest.mark.usefixtures("unchecked_shapes")
def test_class_captions_of_rainbow_differ_in_one_factor():
    every = [rainbow(drawing) for drawing in all_drawings()]
    found = class_captions(every)
    assert {name: len(values) for name, values in found.items()} == {
        "size": 4, "fill": 2, "texture": 3, "colour": 12, "shape": 8, "rotation": 4,
    }  # fmt: skip
    written = {meta["captions"][0] for meta in every}
    for values in found.values():
        for captions_of_value in values.values():
            assert 1 <= len(captions_of_value) <= CONTEXTS
            assert set(captions_of_value) <= written
    assert all("cyan" in caption for caption in found["colour"]["cyan"])
    few = class_captions([rainbow(Drawing("small", "", "", colour, "circle", "")) for colour in ("red", "blue")])
    assert few["colour"] == {"red": ["small red circle"], "blue": ["small blue circle"]}
    assert few["rotation"] == {}


def test_class_captions_of_other_data():
    metas = [{"captions": ["a cat"], "concept": "cat", "style": "photo"}, {"captions": ["dogs"], "concept": "dog"}]
    assert class_captions(metas) == {"concept": {"cat": ["a cat"], "dog": ["dogs"]}}
    assert class_captions([{"captions": ["x"], "concept": None, "style": None}]) == {}
