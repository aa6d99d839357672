"""The kinds of text tokenizer, and how one comes back from a checkpoint."""

from typing import Any

from dalle_pytorch.errors import UserError
from dalle_pytorch.text.bart import BartTokenizer
from dalle_pytorch.text.base import TextTokenizer, clean_caption
from dalle_pytorch.text.bpe import BPETokenizer
from dalle_pytorch.text.cleaned import CleanedTokenizer
from dalle_pytorch.text.clip_bpe import CLIPTokenizer
from dalle_pytorch.text.hf import HFDirectoryTokenizer, HFTokenizer

__all__ = ["KINDS", "TextTokenizer", "clean_caption", "text_tokenizer_from_state"]

KINDS: dict[str, type[TextTokenizer]] = {
    "bpe": BPETokenizer,
    "clip": CLIPTokenizer,
    "hf": HFTokenizer,
    "hf_directory": HFDirectoryTokenizer,
    "hf_cleaned": CleanedTokenizer,
    "bart": BartTokenizer,
}


def text_tokenizer_from_state(state: dict[str, Any]) -> TextTokenizer:
    """Rebuilds the text tokenizer that a checkpoint carries.

    Args:
        state: what `TextTokenizer.state()` gave, perhaps through JSON.

    Returns:
        A tokenizer with the same ids for the same captions.

    Raises:
        ValueError: the kind is unknown, or keys are missing or left over.
    """
    kind = state.get("kind")
    if kind not in KINDS:
        raise UserError(f"unknown kind of text tokenizer: {kind!r}; known: {', '.join(KINDS)}")
    return KINDS[kind].from_state(state)
