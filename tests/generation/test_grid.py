"""Grids for people: text that stays in its place and can be read, pictures enlarged without smoothing."""

import pytest
import torch
from PIL import ImageFont

from dalle_pytorch.generation import grid
from dalle_pytorch.generation.grid import LINE, GridRow, fonts_at_hand, has, picture_grid, readable, wrapped

FONT = ImageFont.load_default(13)


def test_lines_hold_all_words_within_the_width():
    text = "woman firefighter: medium skin tone, fluent flat emoji"
    for width in (60, 128, 1000):
        lines = wrapped(text, width, FONT)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(FONT.getlength(line) <= width for line in lines)
    assert " ".join(wrapped(text, 128, FONT)) == text  # no word is wider, so none is broken
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


@pytest.mark.parametrize("prompt", ["a red\nheart", "a red\r\n\theart ", "a  red\u2028heart"])
def test_white_space_of_a_prompt_does_not_move_the_title(prompt):
    image = torch.rand(3, 8, 8)
    expected, found = (picture_grid([GridRow(title, [image] * 2, [])]) for title in ("a red heart", prompt))
    assert found.tobytes() == expected.tobytes()


@pytest.fixture
def only_pillows_font(monkeypatch):
    """A system without any of the fonts."""
    monkeypatch.setattr(grid, "FONTS", ())
    fonts_at_hand.cache_clear()
    yield
    fonts_at_hand.cache_clear()


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("cat", "cat"),
        ("caf\u00e9", r"caf\xe9"),  # Pillow's font has ASCII only
        ("cafe\u0301", r"caf\xe9"),
        ("猫 cat", r"\u732b cat"),
        ("a 😀", r"a \U0001f600"),
        ("bell\x07 \x1b[31m", r"bell\x07 \x1b[31m"),
        ("abc\u202ecba", r"abc\u202ecba"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_no_font_has_is_shown_as_an_escape(only_pillows_font, prompt, shown):
    assert readable(prompt)[0] == shown
    picture_grid([GridRow(prompt, [torch.rand(3, 8, 8)], [])])


def test_a_font_that_has_the_letters_is_taken(monkeypatch):
    """Here a font that has all of them stands for one of the system's."""
    other = ImageFont.load_default(14)
    monkeypatch.setattr(grid, "fonts_at_hand", lambda: (grid.default_font(), other))
    monkeypatch.setattr(grid, "has", lambda font, letter: font is other or has(font, letter))
    assert readable("猫 cat") == ("猫 cat", other)
    assert readable("cat") == ("cat", grid.default_font())


def test_a_shape_of_its_own_tells_what_a_font_has():
    assert all(has(FONT, letter) for letter in "aZ9# ~")
    assert not any(has(FONT, letter) for letter in "猫\n\x07\u200d")
