"""The contract, held to by every kind of text tokenizer."""
# ruff: noqa: RUF001 (captions with their own typography)

import json
import multiprocessing
import pickle
import random
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader

from dalle_pytorch.text import KINDS, TextTokenizer, clean_caption, text_tokenizer_from_state

TEXTS = [
    "a red apple",
    "Flag: Côte d’Ivoire 🇨🇮 & ½ naïve “ﬁnger”",
    "👩‍👩‍👧 family, 🏴󠁧󠁢󠁥󠁮󠁧󠁿 and e\u0301",
    "一只猫，很可爱。ＡＢＣ",
    "c#!/bin/sh !a!",
    "<pad> [PAD] [CLS] <|endoftext|> <s>",
    "sÃ³ &amp;amp; \ud800 \x00 null",
    "  tabs\tand\nlines\u00a0",
    "",
]


def random_texts(count: int) -> Iterator[str]:
    rng = random.Random(0)
    ranges = [(32, 127), (32, 127), (160, 0x250), (0x4E00, 0x4F00), (0x1F300, 0x1F5FF)]
    for _ in range(count):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(20)))


@pytest.mark.parametrize(
    ("found", "cleaned"),
    [
        ("  a\n red\t apple ", "a red apple"),
        ("sÃ³ âœ”", "só ✔"),
        ("salt &amp;amp; pepper", "salt & pepper"),
        ("“Hi”", '"Hi"'),
        (" \n ", ""),
    ],
)
def test_captions_are_repaired(found: str, cleaned: str) -> None:
    assert clean_caption(found) == cleaned
    assert clean_caption(found, lowercase=True) == cleaned.lower()


def test_typography_is_kept_when_asked() -> None:
    assert clean_caption("“猫”，", plain_typography=False) == "“猫”，"
    assert clean_caption("“猫”，") == '"猫",'


def test_ids_are_in_range_and_never_padding(tokenizer: TextTokenizer) -> None:
    for text in [*TEXTS, *random_texts(300)]:
        assert all(0 < i < tokenizer.vocab_size for i in tokenizer.encode(text)), text


@pytest.mark.parametrize("kind", ["bpe", "hf"])
def test_decode_inverts_encode(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    for text in [*TEXTS, *random_texts(300)]:
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.clean(text)


def test_decode_inverts_encode_but_for_white_space(clip: TextTokenizer) -> None:
    for text in [*TEXTS, *random_texts(300)]:
        decoded = clip.decode(clip.encode(text))
        assert decoded.replace(" ", "") == clip.clean(text).replace(" ", "")


def test_batch_is_padded_with_zeros(tokenizer: TextTokenizer) -> None:
    texts = ["一只猫", "", "cat 一只红色的猫"]
    rows = tokenizer.tokenize(texts, 40)
    assert rows.shape == (3, 40)
    assert rows.dtype == torch.int64
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.encode(text)
        assert row.tolist() == ids + [0] * (40 - len(ids))
        assert tokenizer.decode(row) == tokenizer.decode(ids)


def test_empty_caption_is_all_padding(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("") == tokenizer.encode(" \n") == []
    assert not tokenizer.tokenize("").any()
    assert tokenizer.decode(tokenizer.tokenize("")[0]) == ""


def test_bare_string_is_a_batch_of_one(tokenizer: TextTokenizer) -> None:
    assert torch.equal(tokenizer.tokenize("cat"), tokenizer.tokenize(["cat"]))
    assert tokenizer.tokenize([], 8).shape == (0, 8)


def test_too_long_caption_is_an_error_that_says_so(tokenizer: TextTokenizer) -> None:
    long = "一只猫 " * 100
    count = len(tokenizer.encode(long))
    with pytest.raises(ValueError, match=rf"一只猫 .*…' has {count} tokens.* 16; .*truncate=True"):
        tokenizer.tokenize(["cat", long], 16)
    exact = tokenizer.tokenize(long, count)
    assert torch.equal(tokenizer.tokenize(long, 16, truncate=True), exact[:, :16])
    # The two ways to ask for it in DALLE-pytorch 1.6.6.
    assert torch.equal(tokenizer.tokenize(long, 16, True), exact[:, :16])
    assert torch.equal(tokenizer.tokenize(long, 16, truncate_text=True), exact[:, :16])


def test_decode_skips_what_the_caller_calls_padding(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("cat")
    beyond = set(range(tokenizer.vocab_size, tokenizer.vocab_size + 8))
    assert tokenizer.decode([*ids, *beyond], pad_tokens=beyond) == tokenizer.decode(ids)


def test_decode_refuses_ids_out_of_range(tokenizer: TextTokenizer) -> None:
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(ValueError, match=f"text token {wrong} is out of range"):
            tokenizer.decode([1, wrong])
    with pytest.raises((ValueError, TypeError)):  # the shape check of the tests may come first
        tokenizer.decode(torch.ones(2, 3, dtype=torch.int64))
    tokenizer.decode([tokenizer.vocab_size - 1])


def test_wrong_arguments_are_named(tokenizer: TextTokenizer) -> None:
    with pytest.raises(TypeError):
        tokenizer.tokenize(["cat", None])
    with pytest.raises(ValueError, match="context_length"):
        tokenizer.tokenize("cat", 0)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1\.5"):
        tokenizer.encode("cat", dropout=1.5, rng=random.Random(0))
    with pytest.raises(ValueError, match="needs rng"):
        tokenizer.encode("cat", dropout=0.1)


def test_state_survives_json_and_pickle(tokenizer: TextTokenizer) -> None:
    state = tokenizer.state()
    assert KINDS[state["kind"]] is type(tokenizer)
    through_json = text_tokenizer_from_state(json.loads(json.dumps(state)))
    for copy in (through_json, pickle.loads(pickle.dumps(tokenizer))):
        assert type(copy) is type(tokenizer)
        assert copy.state() == state
        assert copy.vocab_size == tokenizer.vocab_size
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert copy.encode(text) == ids
            assert copy.decode(ids) == tokenizer.decode(ids)


def test_bad_states_are_named(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="'yttm'; known: bpe, clip, hf, hf_directory"):
        text_tokenizer_from_state({"kind": "yttm"})
    with pytest.raises(ValueError, match="extra"):
        text_tokenizer_from_state({**tokenizer.state(), "extra": 1})
    with pytest.raises(ValueError, match="cannot read a state of kind 'yttm'"):
        type(tokenizer).from_state({"kind": "yttm"})


# Python 3.12 and later warn of any fork of a process with threads.
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_works_in_data_loader_workers(bpe: TextTokenizer, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    loader = DataLoader(
        TEXTS,
        batch_size=len(TEXTS),
        collate_fn=bpe.tokenize,
        num_workers=1,
        multiprocessing_context=method,
    )
    assert torch.equal(next(iter(loader)), bpe.tokenize(TEXTS))
