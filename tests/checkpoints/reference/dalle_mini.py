"""Record how dalle-mini tidies captions, and the ids that BART's own tokenizer gives for a small vocabulary.

Of dalle-mini only one file is run, with emoji, ftfy, huggingface_hub and unidecode; the tokenizer is transformers' own:

    git clone https://github.com/borisdayma/dalle-mini   # f0be4de
    PYTHONPATH=dalle-mini/src/dalle_mini/model python -P tests/checkpoints/reference/dalle_mini.py
"""

# ruff: noqa: RUF001 (captions with their own typography)

import json
import math
import random
import re
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

WORDS = [
    *[
        "the",
        "of",
        "and",
        "a",
        "to",
        "in",
        "is",
        "it",
        "was",
        "cat",
        "painting",
        "red",
        "apple",
        "face",
        "super",
        "man",
    ],
    *["superman", "sunset", "art", "new", "york", "2", "s", "t", "tag"],
]
"""The most frequent first."""
MERGES = [
    *["t h", "th e", "Ġ the", "Ġ a", "i n", "in g", "a t", "c at", "Ġ cat", "r e", "re d", "Ġ red", "a n", "an d"],
    *["' s", "1 0", "Ġ ,", "o n", "Ġ p", "< s"],
]
PIECES = [
    *["a cat", "The CAT", "  two  ", "tab\there", "new\nline", "café", "naïve Ærø", "100 things", "3.14", "7,000", "½"],
    *[
        "1,234,567",
        "12/25/2020",
        "1.2.3.4",
        "a.b.c",
        "😀",
        "❤️ red",
        "🇨🇮",
        "👩‍🚀",
        "it's",
        "we'll",
        "o'clock",
        "'quoted'",
    ],
    *[
        '"double"',
        "`tick`",
        "#superman",
        "#the_redapple",
        "#NewYork2022",
        "#a#b",
        "re-read",
        "--",
        "a - b",
        "<b>bold</b>",
    ],
    *["<person>", "<person> and <person>, <person>", "[12]", " [3]", "http://x.y/z?a=1", "www.foo.com", "~tilde^", "…"],
    *[
        "日本",
        "“quoted”",
        "it’s",
        "&amp;amp;",
        "&lt;p&gt;",
        "100%",
        "$5",
        "a/b",
        "***",
        "aaaaa",
        "????",
        "xvIIII",
        "(in)",
    ],
    *["{a}", "a_b", "\\n", ",", "a , b", "'s", "''", "rock'n'roll", "50,000.50", "@me", "x=y+z", "ﬁne", "ⅷ", "Привет"],
]


def captions() -> list[str]:
    """Strings of all sorts, the same in every run."""
    rng = random.Random(0)
    mixed = (rng.choice([" ", "", ", "]).join(rng.choices(PIECES, k=rng.randint(2, 5))) for _ in range(250))
    return ["", " ", ",", *PIECES, *mixed]


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """A small vocabulary in BART's manner, of all bytes."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [*(merge.replace(" ", "") for merge in MERGES), "<mask>"]
    return {symbol: i for i, symbol in enumerate(symbols)}, MERGES


def normalizers():
    """dalle-mini's, for hashtags in one piece and for those taken apart, without its list of words from the hub."""
    import text

    text.random.choices = lambda *_: ["a person"]  # of three words that it draws from, the likeliest
    splitter = object.__new__(text.HashtagProcessor)
    splitter._word_cost = {word: math.log(rank) for rank, word in enumerate(WORDS, start=1)}
    splitter._max_word, splitter._SPLIT_RE = max(map(len, WORDS)), re.compile("[^a-zA-Z0-9']+")
    for process in (lambda tag: tag, splitter):
        normalizer = object.__new__(text.TextNormalizer)
        normalizer._hashtag_processor = process
        yield normalizer


def tokenizer():
    """BART's tokenizer, fast as dalle-mini's."""
    from transformers import BartTokenizerFast

    vocab, merges = vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocab))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BartTokenizer"}))
        return BartTokenizerFast.from_pretrained(folder)


def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, of which there are none, and metadata of the fixture."""
    whole, parted = normalizers()
    encode = tokenizer()
    vocab, merges = vocabulary()
    rows = [[text, whole(text), parted(text), encode(whole(text))["input_ids"][1:-1]] for text in captions()]
    notes = {"captions": rows, "words": WORDS, "vocab": vocab, "merges": merges}
    return {}, {key: json.dumps(value) for key, value in notes.items()}


if __name__ == "__main__":
    recorded, notes = record()
    save_file(recorded, Path(__file__).with_suffix(".safetensors"), metadata=notes)
