"""The BPE of OpenAI's CLIP, which is also the default of DALLE-pytorch."""

import gzip
import random
from functools import lru_cache
from importlib.resources import files
from typing import Any

from tokenizers import Regex, pre_tokenizers

from dalle_pytorch.text.base import PAD
from dalle_pytorch.text.bpe import BYTES, SPACE, ByteBPE, Merge, read_merge

END_OF_WORD = "</w>"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
# clip/simple_tokenizer.py, `self.pat`, without the special tokens: a caption that spells one is
# ordinary text here. Compared with dalle-pytorch 1.6.6 on 5,037 strings: the same ids but for
# characters newer than Unicode 14, which its package `regex` and `tokenizers` class differently.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@lru_cache(maxsize=1)
def _clip_merges() -> tuple[Merge, ...]:
    packed = files("dalle_pytorch.text").joinpath("assets", "clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    return tuple(read_merge(line) for line in lines)


class CLIPTokenizer(ByteBPE):
    """OpenAI CLIP's lower-cased BPE of 49,408 ids.

    Ids are OpenAI's, so that their weights and DALLE-pytorch's fit, with one exception: id 0 is
    "!" inside a word ("c#!/bin") there, and padding here. Such a "!" becomes the "!" that ends a
    word, id 256, whose embedding means the same. (Shifting all ids by one would fit no weights.)

    The vocabulary does not keep where white space was ("red-green" decodes to "red - green").

    Source: github.com/openai/CLIP, clip/simple_tokenizer.py.
    """

    kind = "clip"
    lowercase = True

    def __init__(self) -> None:
        merges = _clip_merges()
        symbols = [*BYTES, *(byte + END_OF_WORD for byte in BYTES)]
        symbols += [first + second for first, second in merges]
        symbols += SPECIAL_TOKENS
        vocab = {symbol: i for i, symbol in enumerate(symbols)}
        super().__init__(
            vocab,
            merges,
            pre_tokenizer=pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
            end_of_word=END_OF_WORD,
        )
        self._special_ids = {vocab[token] for token in SPECIAL_TOKENS}
        self._final_exclamation = vocab["!" + END_OF_WORD]

    def state(self) -> dict[str, Any]:
        """Only the kind: the vocabulary comes with this package."""
        return {"kind": self.kind}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "CLIPTokenizer":
        """Rebuilds the tokenizer from its `state()`."""
        cls._check_state(state, set())
        return cls()

    def _encode(self, text: str) -> list[int]:
        return self._free_padding_id(super()._encode(text))

    def _encode_with_dropout(self, text: str, dropout: float, rng: random.Random) -> list[int]:
        return self._free_padding_id(super()._encode_with_dropout(text, dropout, rng))

    def _free_padding_id(self, ids: list[int]) -> list[int]:
        return [self._final_exclamation if i == PAD else i for i in ids]

    def _decode(self, ids: list[int]) -> str:
        symbols = [self._symbols[i] for i in ids if i not in self._special_ids]
        return self._bytes.decode(
            [symbol.removesuffix(END_OF_WORD) + SPACE if symbol.endswith(END_OF_WORD) else symbol for symbol in symbols]
        )
