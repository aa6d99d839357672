"""DALL·E mini's tokenizer against min-dalle, dalle-mini and transformers, as recorded by their scripts."""

import json
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from dalle_pytorch.errors import UserError
from dalle_pytorch.text import BartTokenizer, text_tokenizer_from_state
from dalle_pytorch.text.bart import SPECIAL_TOKENS, read_words, split_words, word_costs

REFERENCE = Path(__file__).parents[1] / "checkpoints" / "reference"
Make = Callable[..., BartTokenizer]


def recorded(name: str) -> dict[str, Any]:
    with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def tokenizer_of(notes: dict[str, Any], **settings: Any) -> BartTokenizer:
    merges = [tuple(merge.split(" ")) for merge in notes["merges"]]
    return BartTokenizer(notes["vocab"], merges, **settings)


@pytest.fixture(scope="module")
def min_dalle() -> dict[str, Any]:
    return recorded("min_dalle")


@pytest.fixture(scope="module")
def dalle_mini() -> dict[str, Any]:
    return recorded("dalle_mini")


@pytest.fixture(params=["min_dalle", "dalle_mini"])
def tokenizer(request: pytest.FixtureRequest) -> BartTokenizer:
    return tokenizer_of(request.getfixturevalue(request.param), normalize=request.param)


def test_ids_are_min_dalles(min_dalle: dict[str, Any]) -> None:
    """All but those of a caption that spells <s>, whose id there is that of the real one."""
    tokenizer = tokenizer_of(min_dalle, normalize="min_dalle")
    assert len(min_dalle["captions"]) > 200
    for text, ids in min_dalle["captions"]:
        assert tokenizer.encode(text) == [3 if i == 0 else i for i in ids], text
    spelt = [ids for text, ids in min_dalle["captions"] if "<s>" in text]
    assert any(0 in ids for ids in spelt)


def test_captions_are_tidied_as_by_dalle_mini(dalle_mini: dict[str, Any]) -> None:
    """All but for a marker of its own that dalle-mini leaves in hashtags with a dot or an apostrophe."""
    whole, parted = tokenizer_of(dalle_mini), tokenizer_of(dalle_mini, words=dalle_mini["words"])
    assert len(dalle_mini["captions"]) > 200
    marked = 0
    for text, once, twice, _ in dalle_mini["captions"]:
        assert " " + whole.clean(text) == once, text
        marked += "x t o k x" in twice
        assert " " + parted.clean(text) == twice or "x t o k x" in twice, text
    assert marked < 5


def test_ids_are_those_of_barts_tokenizer(dalle_mini: dict[str, Any]) -> None:
    """All but those of a caption with nothing left in it, which is one space there."""
    tokenizer = tokenizer_of(dalle_mini)
    space = dalle_mini["vocab"]["Ġ"]
    for text, _, _, ids in dalle_mini["captions"]:
        assert tokenizer.encode(text) == ([] if ids == [space] else ids), text
    assert any(ids == [space] for *_, ids in dalle_mini["captions"])


@pytest.mark.parametrize(
    ("normalize", "text", "clean"),
    [
        ("min_dalle", " A café,  the\t😀 ", "a caf, the\tgrinning_face"),
        ("dalle_mini", " A café;  the\t😀 (2/3)", "a cafe, the, grinning face, 2/3"),
        ("dalle_mini", "It's <b>1,000.5</b> 'ART' http://x.y", 'it\'s 1000.5 " art "'),
        ("dalle_mini", "<person>, <person> and a <person>", "people and a a person"),
    ],
)
def test_tidying_by_example(normalize: str, text: str, clean: str, request: pytest.FixtureRequest) -> None:
    assert tokenizer_of(request.getfixturevalue(normalize), normalize=normalize).clean(text) == clean


def test_no_caption_makes_padding_or_a_special_token(tokenizer: BartTokenizer) -> None:
    rng = random.Random(0)
    for text in [*SPECIAL_TOKENS, "<mask>", "a<s>b", "< s >", "\x00\x01", "".join(map(chr, range(1, 400)))]:
        for dropout in (0.0, 0.5):
            ids = tokenizer.encode(text, dropout=dropout, rng=rng)
            assert all(2 < i < tokenizer.vocab_size for i in ids), text
    assert tokenizer.encode("") == tokenizer.encode(" ") == []
    assert tokenizer.tokenize(["", "a"], context_length=3).tolist() == [[0, 0, 0], [*tokenizer.encode("a"), 0, 0]]


def test_the_mask_of_bart_is_left_out(min_dalle: dict[str, Any]) -> None:
    """DALL·E mini has as many embeddings as there are symbols before it."""
    assert max(min_dalle["vocab"], key=min_dalle["vocab"].get) == "<mask>"
    assert tokenizer_of(min_dalle).vocab_size == len(min_dalle["vocab"]) - 1


def test_decoding_gives_the_tidied_caption(tokenizer: BartTokenizer) -> None:
    text = "The red cat, and 100 things"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.clean(text) == "the red cat, and 100 things"
    assert tokenizer.decode([0, *ids, 2, 1, 1]) == tokenizer.clean(text)


def test_dropout_keeps_the_text_and_follows_the_seed(tokenizer: BartTokenizer) -> None:
    text = "the red cat and the red cat"
    drawn = [tokenizer.encode(text, dropout=0.5, rng=random.Random(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(tokenizer.decode(ids) == text for ids in drawn)
    assert tokenizer.encode(text, dropout=1e-12, rng=random.Random(0)) == tokenizer.encode(text)


def test_state_and_pickle_keep_everything(dalle_mini: dict[str, Any], min_dalle: dict[str, Any]) -> None:
    for tokenizer in (
        tokenizer_of(min_dalle, normalize="min_dalle"),
        tokenizer_of(dalle_mini, words=dalle_mini["words"]),
    ):
        text = "The café #redcat, <s> and 100 things"
        for again in (
            text_tokenizer_from_state(json.loads(json.dumps(tokenizer.state()))),
            pickle.loads(pickle.dumps(tokenizer)),
        ):
            assert again.state() == tokenizer.state()
            assert again.encode(text) == tokenizer.encode(text)
            assert again.vocab_size == tokenizer.vocab_size


def test_hashtags_are_taken_apart_by_the_likeliest_words(tmp_path: Path) -> None:
    costs = word_costs(["the", "red", "cat", "redcat", "a", "t"])
    assert split_words("theredcat", costs) == "the redcat"  # log 1 + log 4 is less than log 1 + log 2 + log 3
    assert split_words("redcat2022red", costs) == "redcat 2022 red"
    assert split_words("", costs) == ""
    (tmp_path / "words.txt").write_text("the 1234\nof 99\n\nand 7\n")
    assert read_words(tmp_path / "words.txt") == ["the", "of", "and"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no words"):
        read_words(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("normalize", "package"), [("min_dalle", "emoji"), ("dalle_mini", "emoji"), ("dalle_mini", "unidecode")]
)
def test_a_missing_package_is_named_when_it_is_needed(
    normalize: str, package: str, min_dalle: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    tokenizer = tokenizer_of(min_dalle, normalize=normalize)
    assert tokenizer.decode([5, 6]) == "ab"
    with pytest.raises(UserError, match=f"pip install {package}"):
        tokenizer.encode("a cat")


def test_misfits_are_named(min_dalle: dict[str, Any]) -> None:
    vocab = min_dalle["vocab"]
    with pytest.raises(ValueError, match="normalize must be one of dalle_mini, min_dalle, got 'none'"):
        BartTokenizer(vocab, [], normalize="none")
    with pytest.raises(ValueError, match=r"\[5, 1, 2\].*BART has 0, 1, 2"):
        BartTokenizer({**vocab, "<s>": 5}, [])
    with pytest.raises(ValueError, match="BART has 0, 1, 2, and <unk>"):
        BartTokenizer({symbol: i for symbol, i in vocab.items() if symbol != "<unk>"}, [])
    with pytest.raises(ValueError, match=r"merge 'q' 'q'.*\['qq'\]"):
        BartTokenizer(vocab, [("q", "q")])
    state = BartTokenizer(vocab, []).state()
    del state["normalize"]
    with pytest.raises(ValueError, match="normalize"):
        text_tokenizer_from_state(state)
