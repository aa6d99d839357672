"""Training of the byte-level BPE, and BPE dropout."""

import json
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer

from dalle_pytorch.text import BPETokenizer, CLIPTokenizer
from dalle_pytorch.text.bpe import BYTES, ByteBPE


@pytest.fixture(params=["bpe", "clip"])
def byte_bpe(request: pytest.FixtureRequest) -> ByteBPE:
    return request.getfixturevalue(request.param)


def test_same_captions_give_the_same_tokenizer(bpe: BPETokenizer, captions: list[str]) -> None:
    assert BPETokenizer.train(iter(captions), 400).state() == bpe.state()
    assert BPETokenizer.train(reversed(captions), 400).state() == bpe.state()


def test_training_is_the_same_in_another_process(bpe: BPETokenizer, captions: list[str]) -> None:
    code = (
        "from dalle_pytorch.text import BPETokenizer\n"
        f"merges = BPETokenizer.train({captions!r}, 400).state()['merges']\n"
        "import sys; sys.stdout.buffer.write('\\n'.join(merges).encode())"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout
    assert found.decode() == "\n".join(bpe.state()["merges"])


def test_ids_are_padding_bytes_merges(bpe: BPETokenizer) -> None:
    assert bpe.encode("!~") == [bpe._vocab[s] for s in ("Ġ", "!", "~")]
    assert [bpe._vocab[s] for s in ("<pad>", *BYTES)] == list(range(257))
    assert list(bpe._vocab.values()) == list(range(bpe.vocab_size))


def test_equals_a_tokenizer_trained_by_the_library(
    captions: list[str], train_byte_level: Callable[[list[str]], Tokenizer]
) -> None:
    theirs = train_byte_level(["<pad>"])
    merges = json.loads(theirs.to_str())["model"]["merges"]
    ours = BPETokenizer([(first, second) for first, second in merges], lowercase=False)
    assert ours._vocab == theirs.get_vocab()
    for caption in captions:  # the space is the prefix that ours puts itself
        assert ours.encode(caption) == theirs.encode(" " + ours.clean(caption)).ids


def test_vocabulary_size_is_a_setting_and_a_bound(captions: list[str]) -> None:
    assert BPETokenizer.train(captions, 257).vocab_size == 257
    assert BPETokenizer.train(captions, 300).vocab_size == 300
    assert BPETokenizer.train(captions, 50_000).vocab_size < 1_000


def test_frequent_words_become_one_token(bpe: BPETokenizer, captions: list[str]) -> None:
    large = BPETokenizer.train(captions, 1_000)
    assert len(large.encode("apple red APPLE")) == 3
    first, _, last = large.encode("apple red APPLE")
    assert first == last


def test_case_is_a_setting(captions: list[str]) -> None:
    cased = BPETokenizer.train(captions, 400, lowercase=False)
    again = BPETokenizer.from_state(cased.state())
    assert again.decode(again.encode("A Red Apple")) == "A Red Apple"


def test_training_errors_are_named(captions: list[str]) -> None:
    with pytest.raises(ValueError, match="at least 257, got 256"):
        BPETokenizer.train(captions, 256)
    with pytest.raises(ValueError, match="no captions"):
        BPETokenizer.train(["", " "], 300)
    with pytest.raises(ValueError, match="several strings"):
        BPETokenizer.train("a red apple", 300)
    with pytest.raises(ValueError, match="not a BPE merge"):
        BPETokenizer.from_state({"kind": "bpe", "lowercase": True, "merges": ["ab"]})


def test_merging_without_dropout_is_the_library_s(byte_bpe: ByteBPE, captions: list[str]) -> None:
    rng = random.Random(0)
    texts = [*captions, "aaaa aaaaaaa", "abababababa", "!a!!! c#!/bin", "👩‍👩‍👧 ½ naïve"]
    texts += ["".join(rng.choices("aeinrst ", k=30)) for _ in range(200)]
    for text in texts:
        text = byte_bpe.clean(text)
        assert byte_bpe._encode_with_dropout(text, 0.0, rng) == byte_bpe.encode(text)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1.0])
def test_dropout_changes_tokens_and_not_text(byte_bpe: ByteBPE, dropout: float, captions: list[str]) -> None:
    rng = random.Random(0)
    for text in captions:
        ids = byte_bpe.encode(text, dropout=dropout, rng=rng)
        assert 0 not in ids
        assert byte_bpe.decode(ids) == byte_bpe.decode(byte_bpe.encode(text))


def test_full_dropout_leaves_the_bytes(clip: CLIPTokenizer, bpe: BPETokenizer) -> None:
    rng = random.Random(0)
    assert len(clip.encode("a red apple", dropout=1.0, rng=rng)) == 9
    assert len(bpe.encode("a red apple", dropout=1.0, rng=rng)) == 12  # the spaces count


def test_dropout_follows_its_generator_and_no_other(byte_bpe: ByteBPE, captions: list[str]) -> None:
    def draw(seed: int) -> torch.Tensor:
        return byte_bpe.tokenize(captions, dropout=0.3, rng=random.Random(seed))

    random.seed(0)
    first = draw(1)
    random.seed(1)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)


def test_dropout_skips_each_merge_with_its_probability() -> None:
    tokenizer = BPETokenizer([("a", "b")], lowercase=True)
    rng = random.Random(0)
    kept = sum(len(tokenizer.encode("ab", dropout=0.3, rng=rng)) == 2 for _ in range(4_000))
    # 2 tokens are "Ġ", "ab"; the standard deviation of the share is 0.007.
    assert kept / 4_000 == pytest.approx(0.7, abs=0.03)
