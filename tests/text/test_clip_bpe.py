"""OpenAI's ids, as DALLE-pytorch's tokenizer gives them."""
# ruff: noqa: RUF001 (curly quotes on purpose)

import pytest

from dalle_pytorch.text import CLIPTokenizer

# Source: `SimpleTokenizer().encode` of the PyPI wheel dalle-pytorch==1.6.6, run once; id 0 ("!"
# inside a word) is 256 here, as CLIPTokenizer says.
GOLDEN = {
    "a red apple": [320, 736, 3055],
    "A Small SHADED orange circle": [320, 2442, 43506, 4287, 7117],
    "it's the dog's, they're": [585, 568, 518, 1929, 568, 267, 889, 982],
    "wow!!! so cool!?": [2781, 995, 706, 2077, 6004],
    "naïve café Über straße": [1097, 35689, 563, 15304, 6522, 1516, 1894, 127, 253, 324],
    "'\u017f": [6, 129, 379],
    "一只猫坐": [19759, 222, 34517, 103, 163, 234, 104, 161, 251, 494],
    "русский текст": [16370, 39729, 23669, 23669, 27152, 29503, 373, 17875, 22176, 27152, 23669, 141, 480],
    "🍎🍏 👩‍👩‍👧": [2011, 236, 2011, 493, 26304, 26304, 964, 356],
    "12345 3.14": [272, 273, 274, 275, 276, 274, 269, 272, 275],
    "&lt;b&gt; &amp;amp; &quot;": [283, 321, 285, 261, 257],
    "sÃ³ mojibake âœ”": [82, 27733, 617, 3252, 11878, 13749],
    "“curly” ‘quotes’ ﬁ": [257, 20795, 257, 262, 5808, 262, 3589],
    "  tabs\tand\nnewlines  ": [29163, 537, 1218, 3418],
    "e\u0301 combining": [4166, 23561],
    "abababababab": [596, 596, 596, 596, 596, 3937],
    "c#!/bin/sh": [322, 2, 256, 270, 5346, 270, 849],
    "!": [256],
    "": [],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_ids_are_openai_s(clip: CLIPTokenizer, text: str) -> None:
    assert clip.encode(text) == GOLDEN[text]


def test_vocabulary_is_openai_s(clip: CLIPTokenizer) -> None:
    assert clip.vocab_size == len(clip._vocab) == 49_408
    assert clip._vocab["<|startoftext|>"] == 49_406


def test_special_tokens_are_neither_added_nor_decoded(clip: CLIPTokenizer) -> None:
    assert max(clip.encode("<|startoftext|> berwick <|endoftext|>")) < 49_406
    ids = [49_406, *clip.encode("berwick"), 49_407, 0]
    assert clip.decode(ids) == "berwick"  # 1.6.6 drops "berwick" (40407) and keeps 49407


def test_decode_puts_spaces_where_words_end(clip: CLIPTokenizer) -> None:
    assert clip.decode(clip.encode("It's a red-green apple")) == "it 's a red - green apple"
