"""Hugging Face vocabularies of rankers, whose captions are cleaned in their own way first."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_pytorch.errors import UserError
from dalle_pytorch.text.base import clean_caption
from dalle_pytorch.text.hf import HFTokenizer

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def siglip(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces; encodings are not repaired.

    Source: `SiglipTokenizer.canonicalize_text` of transformers.
    """
    return " ".join(text.lower().translate(WITHOUT_PUNCTUATION).split())


def canonicalize(text: str) -> str:
    """As `siglip`, but with the encoding repaired and underscores made spaces.

    Source: open_clip/tokenizer.py, `_clean_canonicalize`.
    """
    return siglip(clean_caption(text).replace("_", " "))


def lower(text: str) -> str:
    """Repaired, lower-cased, single spaces. Source: open_clip/tokenizer.py, `_clean_lower`."""
    return clean_caption(text, lowercase=True)


CLEANINGS: dict[str, Callable[[str], str]] = {
    "siglip": siglip,
    "canonicalize": canonicalize,
    "lower": lower,
    "whitespace": clean_caption,
}
"""What is done to a caption; all but the first are open_clip's names."""


class CleanedTokenizer(HFTokenizer):
    """A `tokenizer.json` behind one of the CLEANINGS; ids are those of `HFTokenizer`.

    Args:
        path: a `tokenizer.json`.
        clean: a name of CLEANINGS.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no tokenizer, or an unknown cleaning.
    """

    kind = "hf_cleaned"

    def __init__(self, path: str | Path, *, clean: str) -> None:
        super().__init__(path)
        self._set_cleaning(clean)

    def clean(self, text: str) -> str:
        """The caption as this tokenizer sees it."""
        return CLEANINGS[self._cleaning](text)

    def state(self) -> dict[str, Any]:
        """The whole of the `tokenizer.json`, and the cleaning."""
        return {**super().state(), "clean": self._cleaning}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "CleanedTokenizer":
        """Rebuilds the tokenizer from its `state()`, without its file."""
        cls._check_state(state, {"tokenizer", "clean"})
        tokenizer = cls.__new__(cls)
        tokenizer._load(state["tokenizer"], f"the state of a tokenizer {cls.kind!r}")
        tokenizer._set_cleaning(state["clean"])
        return tokenizer

    def _set_cleaning(self, clean: str) -> None:
        if clean not in CLEANINGS:
            raise UserError(f"clean must be one of {', '.join(CLEANINGS)}, got {clean!r}")
        self._cleaning = clean
