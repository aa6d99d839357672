"""Byte-level BPE, trained on the captions of a data set."""

import json
import logging
import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import PreTokenizer

from dalle_pytorch.errors import UserError
from dalle_pytorch.text.base import TextTokenizer

log = logging.getLogger(__name__)

PAD_TOKEN = "<pad>"
# The 256 bytes as printable characters, in the order GPT-2 and CLIP number them.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACE = "Ġ"  # the character of the byte 0x20 among them
# A pair of symbols seen once says nothing about the next caption.
MIN_FREQUENCY = 2

Merge = tuple[str, str]


def merge_symbols(symbols: list[str], ranks: dict[Merge, int], dropout: float, rng: random.Random) -> list[str]:
    """Applies BPE merges to the symbols of one word, each skipped with a probability.

    `tokenizers` has BPE dropout too, but draws it from a random generator of the thread that
    nobody can seed; ours must give the same tokens for the same seed.

    Args:
        symbols: the word, one symbol per byte.
        ranks: the merges; the lowest rank is applied first, the leftmost of equals.
        dropout: probability in [0, 1]; 0 is plain BPE, 1 leaves the bytes.
        rng: where the dropout draws from.

    Returns:
        The merged symbols; joined, they are the word.

    Source: Provilkov et al. 2020 (arXiv:1910.13267), algorithm 1.
    """
    while True:
        candidates = [
            (ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in ranks and rng.random() >= dropout
        ]
        if not candidates:
            return symbols
        _, i = min(candidates)
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


class ByteBPE(TextTokenizer):
    """What the two byte-level BPE tokenizers share: encoding and decoding by a merge table.

    Args:
        vocab: symbol → id.
        merges: pairs of symbols, the first learned first.
        pre_tokenizer: splits a caption into words, written in the characters of `BYTES`.
        end_of_word: what marks the last symbol of a word ("" for none).
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: Sequence[Merge],
        *,
        pre_tokenizer: PreTokenizer,
        end_of_word: str = "",
    ) -> None:
        self.vocab_size = len(vocab)
        self._vocab = vocab
        self._symbols = {i: symbol for symbol, i in vocab.items()}
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._end_of_word = end_of_word
        self._tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), end_of_word_suffix=end_of_word))
        self._pre_tokenizer = pre_tokenizer
        self._tokenizer.pre_tokenizer = pre_tokenizer
        self._bytes = decoders.ByteLevel()

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_with_dropout(self, text: str, dropout: float, rng: random.Random) -> list[int]:
        ids = []
        for word, _ in self._pre_tokenizer.pre_tokenize_str(text):
            symbols = [*word[:-1], word[-1] + self._end_of_word]
            merged = merge_symbols(symbols, self._ranks, dropout, rng)
            ids += [self._vocab[symbol] for symbol in merged]
        return ids

    def _decode(self, ids: list[int]) -> str:
        return self._bytes.decode([self._symbols[i] for i in ids])


class BPETokenizer(ByteBPE):
    """Byte-level BPE over the captions it was trained on; any text can be encoded and decoded.

    Id 0 is padding, ids 1 to 256 are the bytes, then one id per merge in the order learned.

    Args:
        merges: pairs of symbols, the first learned first; from `train`.
        lowercase: whether captions are lower-cased.
    """

    kind = "bpe"

    def __init__(self, merges: Sequence[Merge], *, lowercase: bool = True) -> None:
        vocab = {symbol: i for i, symbol in enumerate([PAD_TOKEN, *BYTES])}
        for first, second in merges:
            vocab.setdefault(first + second, len(vocab))
        self.lowercase = lowercase
        self._merges = list(merges)
        super().__init__(vocab, merges, pre_tokenizer=_words())

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, *, lowercase: bool = True) -> "BPETokenizer":
        """Learns the merges from captions; the same captions give the same tokenizer.

        Args:
            captions: the training captions, as found; they are cleaned here.
            vocab_size: ids wanted, padding included; at least 257. Few captions give fewer: see
                `vocab_size` of the result.
            lowercase: whether captions are lower-cased, here and later.

        Raises:
            ValueError: `vocab_size` is too small, or there are no captions.

        Source: byte-level BPE as in GPT-2; DALL·E's paper (arXiv:2102.12092, §2.2) has 16,384 ids.
        """
        smallest = 1 + len(BYTES)
        if vocab_size < smallest:
            raise UserError(f"vocab_size must be at least {smallest}, got {vocab_size}")
        if isinstance(captions, str):
            raise UserError("captions must be several strings, got one")
        empty = cls([], lowercase=lowercase)
        cleaned = [text for caption in captions if (text := empty.clean(caption))]
        if not cleaned:
            raise UserError("no captions to train a BPE tokenizer on: all are empty")
        merges = _learn_merges(cleaned, vocab_size)
        tokenizer = cls(merges, lowercase=lowercase)
        if tokenizer.vocab_size < vocab_size:
            log.info(
                "%d captions gave %d text tokens of the %d asked for",
                len(cleaned),
                tokenizer.vocab_size,
                vocab_size,
            )
        return tokenizer

    def state(self) -> dict[str, Any]:
        """The merges: ids follow from their order."""
        merges = [" ".join(merge) for merge in self._merges]
        return {"kind": self.kind, "lowercase": self.lowercase, "merges": merges}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "BPETokenizer":
        """Rebuilds the tokenizer from its `state()`."""
        cls._check_state(state, {"lowercase", "merges"})
        merges = [read_merge(line) for line in state["merges"]]
        return cls(merges, lowercase=state["lowercase"])


def read_merge(line: str) -> Merge:
    """Reads a merge written as "first second"."""
    first, _, second = line.partition(" ")
    if not first or not second:
        raise UserError(f"not a BPE merge (two symbols with a space between): {line!r}")
    return first, second


def _words() -> PreTokenizer:
    # The prefix space makes a word at the start of a caption the same token as elsewhere.
    return pre_tokenizers.ByteLevel(add_prefix_space=True)


def _learn_merges(captions: list[str], vocab_size: int) -> list[Merge]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _words()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # without padding
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return [(first, second) for first, second in model["merges"]]
