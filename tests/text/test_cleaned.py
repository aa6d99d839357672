"""A tokenizer.json behind a cleaning: the rules of SigLIP and open_clip, and the state."""

import json
import pickle

import pytest
from tokenizers import Tokenizer

from dalle_pytorch.text import CleanedTokenizer, text_tokenizer_from_state
from dalle_pytorch.text.cleaned import CLEANINGS

DIRTY = "  A_red,  \tApple's &amp; caf\u00e9\u2026\n"


def test_cleanings_are_those_of_their_packages():
    """What `SiglipTokenizer.canonicalize_text` and open_clip's `get_clean_fn` gave for the same string."""
    assert {name: clean(DIRTY) for name, clean in CLEANINGS.items()} == {
        "siglip": "ared apples amp caf\u00e9\u2026",
        "canonicalize": "a red apples caf\u00e9\u2026",
        "lower": "a_red, apple's & caf\u00e9\u2026",
        "whitespace": "A_red, Apple's & caf\u00e9\u2026",
    }


@pytest.fixture
def tokenizer(hf_file) -> CleanedTokenizer:
    return CleanedTokenizer(hf_file, clean="canonicalize")


def test_ids_are_the_files_of_the_cleaned_text(tokenizer, hf_file):
    raw = Tokenizer.from_file(str(hf_file))
    assert tokenizer.shift == 1  # its id 0 is a byte
    assert [i - 1 for i in tokenizer.encode(DIRTY)] == raw.encode("a red apples caf\u00e9\u2026").ids
    assert tokenizer.encode("?!") == []


def test_it_comes_back_from_its_state(tokenizer):
    state = json.loads(json.dumps(tokenizer.state()))
    for again in (text_tokenizer_from_state(state), pickle.loads(pickle.dumps(tokenizer))):
        assert again.encode(DIRTY) == tokenizer.encode(DIRTY)
        assert again.state() == tokenizer.state()
    with pytest.raises(ValueError, match="clean must be one of siglip, canonicalize, lower, whitespace, got 'soap'"):
        text_tokenizer_from_state({**state, "clean": "soap"})
