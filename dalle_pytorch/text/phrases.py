"""Phrases of captions that exclude each other, such as the names of styles: whole words, letter by letter."""

import re
from collections.abc import Sequence

from dalle_pytorch.errors import UserError


def held_phrase(caption: str, phrases: Sequence[str]) -> str | None:
    """The phrase that a caption holds, the longest of several; None if it holds none."""
    return max((phrase for phrase in phrases if _pattern(phrase).search(caption)), key=len, default=None)


def exchange(caption: str, held: str, other: str) -> str:
    """The caption with one phrase in place of another that it holds."""
    return _pattern(held).sub(lambda _: other, caption)


def swapped_captions(caption: str, phrases: Sequence[str]) -> list[str]:
    """The caption with each other phrase in place of the one that it holds; none where it holds none."""
    held = held_phrase(caption, phrases)
    return [] if held is None else [exchange(caption, held, other) for other in phrases if other != held]


def _pattern(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(phrase)}(?!\w)")  # re keeps some hundred compiled patterns


def check_phrases(phrases: Sequence[str], name: str) -> None:
    """Refuse phrases that cannot take each other's place.

    Args:
        phrases: two or more, or none.
        name: of the setting.

    Raises:
        ValueError: one only, an empty one, or one twice.
    """
    if phrases and (len(phrases) == 1 or not all(phrases) or len(set(phrases)) < len(phrases)):
        raise UserError(f"{name} must be two or more different phrases, or none, got {list(phrases)}")
