"""Grids for people: text that stays in its place, pictures enlarged without smoothing."""

import pytest
import torch
from PIL import ImageFont

from dalle_pytorch.generation.grid import LINE, GridRow, picture_grid, wrapped

FONT = ImageFont.load_default(13)


def test_lines_hold_all_words_within_the_width():
    text = "woman firefighter: medium skin tone, fluent flat emoji"
    for width in (60, 128, 1000):
        lines = wrapped(text, width, FONT)
        assert " ".join(lines) == text
        assert all(FONT.getlength(line) <= width or " " not in line for line in lines)
    assert wrapped(text, 1000, FONT) == [text]
    assert wrapped("", 10, FONT) == [""]


def test_rows_grow_with_their_labels_and_pictures_stay_whole():
    image = torch.rand(3, 8, 8)
    one, two = (
        picture_grid([GridRow("a", [image, image], [label, "b"]), GridRow("c", [image], [])], cell=64)
        for label in ("b", "two words too long for sixty-four pixels")
    )
    assert two.width == one.width
    lines = len(wrapped("two words too long for sixty-four pixels", 64, FONT))
    assert lines > 1
    assert two.height == one.height + (lines - 1) * LINE
    assert two.crop((0, LINE, one.width, LINE + 64)).tobytes() == one.crop((0, LINE, one.width, LINE + 64)).tobytes()


def test_labels_must_match_the_pictures():
    with pytest.raises(ValueError, match="has 1 pictures and 2 labels"):
        picture_grid([GridRow("a", [torch.rand(3, 8, 8)], ["b", "c"])])
    with pytest.raises(ValueError, match="at least one picture"):
        picture_grid([])
