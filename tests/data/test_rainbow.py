"""The rainbow benchmark."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dalle_pytorch.data.rainbow import (
    COLOURS,
    FILLS,
    ROTATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Drawing,
    all_drawings,
    draw,
    pack_rainbow,
    train_drawings,
)
from dalle_pytorch.data.shards import ShardDataset


def test_one_drawing_for_every_choice_of_factors() -> None:
    drawings = all_drawings()
    factors = (SIZES, FILLS, TEXTURES, COLOURS, SHAPES, ROTATIONS)
    assert [len(names) for names in factors] == [4, 2, 3, 12, 8, 4]
    assert len(drawings) == len(set(drawings)) == len({d.caption for d in drawings}) == 9216
    for place, names in enumerate(factors):
        counts = Counter(drawing[place] for drawing in drawings)
        assert counts == dict.fromkeys(names, 9216 // len(names))


def test_the_caption_of_the_benchmark() -> None:
    drawing = Drawing("small", "", "shaded", "orange", "circle", "rotated clockwise")
    assert drawing in all_drawings()
    assert drawing.caption == "small shaded orange circle rotated clockwise"


def test_thirty_percent_are_trained_on_with_every_factor_among_them() -> None:
    drawings = all_drawings()
    train = train_drawings(drawings)
    assert len(train) == 2765
    for place in range(6):
        assert {d[place] for d in train} == {d[place] for d in drawings}


def test_every_factor_shows() -> None:
    """Pictures are the same only where a turn leaves the shape as it is."""
    pictures: dict[bytes, list[Drawing]] = {}
    for drawing in all_drawings():
        pictures.setdefault(draw(drawing).tobytes(), []).append(drawing)
    assert all(len({d[:5] for d in same}) == 1 for same in pictures.values())
    turns = {same[0].shape: len(same) for same in pictures.values()}
    assert turns == {
        "circle": 4,
        "square": 4,
        "rhombus": 2,
        "rectangle": 2,
        "star": 2,
        "hexagon": 2,
        "triangle": 1,
        "crescent": 1,
    }


def test_a_turn_turns_the_shape() -> None:
    plain, turned = (
        np.asarray(draw(Drawing("huge", "filled", "", "blue", "triangle", rotation)))
        for rotation in ("", "rotated clockwise")
    )
    assert np.array_equal(np.rot90(plain, -1), turned)


def test_packed_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = all_drawings()[::97]
    monkeypatch.setattr("dalle_pytorch.data.rainbow.all_drawings", lambda: few)
    index = pack_rainbow(tmp_path / "a")
    pack_rainbow(tmp_path / "b")
    assert sum(index["splits"].values()) == len(few)
    assert index["splits"]["train"] == round(0.3 * len(few))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    everything = ShardDataset(tmp_path / "a", "train+test")
    assert len(everything) == len(few)
    assert everything[0].meta["captions"] == [Drawing(**everything[0].meta["factors"]).caption]
    with pytest.raises(ValueError, match="train_fraction"):
        pack_rainbow(tmp_path / "c", train_fraction=1.0)
