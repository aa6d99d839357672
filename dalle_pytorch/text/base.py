"""The contract of a text tokenizer, and the cleaning every caption goes through."""

import html
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, ClassVar

import ftfy
import torch
from jaxtyping import Int
from torch import Tensor

from dalle_pytorch.errors import UserError

PAD = 0

# ftfy's typographic replacements, which a vocabulary with its own curly quotes and full-width
# punctuation (Chinese text uses both) must not have.
_KEEP_TYPOGRAPHY = ftfy.TextFixerConfig(uncurl_quotes=False, fix_character_width=False, fix_latin_ligatures=False)


def clean_caption(text: str, *, lowercase: bool = False, plain_typography: bool = True) -> str:
    """Repairs the encoding of a caption and collapses its white space.

    Args:
        text: a caption as found, perhaps mojibake or HTML-escaped.
        lowercase: lower-case it too.
        plain_typography: also turn curly quotes, ligatures and full-width characters into plain
            ones. English vocabularies want this, Chinese ones do not.

    Returns:
        The caption on one line, without white space at its ends; perhaps empty.

    Source: `basic_clean` and `whitespace_clean` of github.com/openai/CLIP, clip/simple_tokenizer.py
    (captions of the web are often escaped twice, hence the two `unescape`).
    """
    text = ftfy.fix_text(text) if plain_typography else ftfy.fix_text(text, _KEEP_TYPOGRAPHY)
    text = " ".join(html.unescape(html.unescape(text)).split())
    return text.lower() if lowercase else text


def _shorten(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


class TextTokenizer(ABC):
    """Turns a caption or a prompt into text tokens and back.

    Ids lie in [0, vocab_size). Id 0 is padding: `encode` never produces it, nor a special token
    (`[CLS]`, `<|endoftext|>`), not even from a caption that spells one. The empty caption encodes
    to no tokens; `tokenize` makes it a row of padding, which is the null caption of guidance.

    Tokenizers may be pickled, so that data loader workers can be forked or spawned.
    """

    kind: ClassVar[str]
    vocab_size: int
    lowercase: bool = False

    def clean(self, text: str) -> str:
        """The caption as this tokenizer sees it: see `clean_caption`."""
        return clean_caption(text, lowercase=self.lowercase)

    def encode(self, text: str, *, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """Encodes one caption, without padding.

        Args:
            text: the caption; it is cleaned here.
            dropout: probability in [0, 1] of skipping a BPE merge, a regulariser for training.
            rng: where the dropout draws from; needed when `dropout` > 0.

        Returns:
            Ids in [1, vocab_size).

        Raises:
            TypeError: `text` is no string.
            ValueError: `dropout` is out of range, comes without `rng`, or is not supported.

        Source: BPE dropout, Provilkov et al. 2020 (arXiv:1910.13267); the paper of DALL·E uses
        0.1 (arXiv:2102.12092, footnote 5).
        """
        if not isinstance(text, str):
            raise TypeError(f"a caption must be a str, got {type(text).__name__}: {text!r}")
        if not 0.0 <= dropout <= 1.0:
            raise UserError(f"dropout is a probability in [0, 1], got {dropout}")
        text = self.clean(text)
        if dropout == 0.0:
            return self._encode(text)
        if rng is None:
            raise UserError(f"dropout={dropout} needs rng, a random.Random to draw from")
        return self._encode_with_dropout(text, dropout, rng)

    def decode(self, ids: Iterable[int] | Int[Tensor, " t"], pad_tokens: Set[int] = frozenset()) -> str:
        """Turns the ids of one caption back into text; padding and special tokens are skipped.

        Args:
            ids: ids in [0, vocab_size).
            pad_tokens: further ids to skip, whatever their range (DALLE-pytorch 1.6.6 passes the
                padding ids of its model).

        Returns:
            `clean(text)` for ids from `encode(text)`, as far as the vocabulary keeps it.

        Raises:
            ValueError: an id is out of range, or `ids` is not one-dimensional.
        """
        if isinstance(ids, Tensor):
            if ids.ndim != 1:
                raise UserError(f"decode takes the ids of one caption, got {tuple(ids.shape)}")
            ids = ids.tolist()
        kept = [int(i) for i in ids if int(i) != PAD and int(i) not in pad_tokens]
        for i in kept:
            if not 0 <= i < self.vocab_size:
                raise UserError(f"text token {i} is out of range: tokenizer {self.kind!r} has {self.vocab_size} tokens")
        return self._decode(kept).strip()

    def tokenize(
        self,
        texts: str | Sequence[str],
        context_length: int = 256,
        truncate: bool = False,
        *,
        truncate_text: bool | None = None,
        dropout: float = 0.0,
        rng: random.Random | None = None,
    ) -> Int[Tensor, "b t"]:
        """Encodes captions into one batch, padded with 0 at the end.

        Args:
            texts: captions; a bare string is a batch of one.
            context_length: length t of every row.
            truncate: cut a caption that is longer than the context instead of raising.
            truncate_text: DALLE-pytorch's name for `truncate`.
            dropout: see `encode`.
            rng: see `encode`.

        Returns:
            Int64 ids of shape (b, context_length).

        Raises:
            ValueError: a caption has more tokens than `context_length` and is not to be truncated.
        """
        if context_length < 1:
            raise UserError(f"context_length must be at least 1, got {context_length}")
        truncate = truncate if truncate_text is None else truncate_text
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.full((len(texts), context_length), PAD, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text, dropout=dropout, rng=rng)
            if len(ids) > context_length and not truncate:
                raise UserError(
                    f"caption {_shorten(text)!r} has {len(ids)} tokens, more than the context "
                    f"length {context_length}; truncate=True cuts it (settings: truncate=true of "
                    "generate, text.truncate=true or a larger model.text_len of a training)"
                )
            ids = ids[:context_length]
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that `from_state` needs, JSON-serialisable: {"kind": ..., ...}; no paths."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: dict[str, Any]) -> "TextTokenizer":
        """Rebuilds the tokenizer from its `state()`.

        Raises:
            ValueError: the state is of another kind, or has missing or unknown keys.
        """

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def _encode_with_dropout(self, text: str, dropout: float, rng: random.Random) -> list[int]:
        raise UserError(f"tokenizer {self.kind!r} has no BPE dropout: use dropout=0, or a 'bpe' or 'clip' one")

    @classmethod
    def _check_state(cls, state: dict[str, Any], keys: Set[str]) -> None:
        if state.get("kind") != cls.kind:
            raise UserError(f"{cls.__name__} cannot read a state of kind {state.get('kind')!r}")
        if found := state.keys() ^ (keys | {"kind"}):
            raise UserError(f"state of tokenizer {cls.kind!r}: missing or unknown {sorted(found)}")

    def __reduce__(self) -> tuple[Callable[..., "TextTokenizer"], tuple[dict[str, Any]]]:
        # Pickling by state keeps the Rust objects out of it and works for fork and spawn alike.
        return type(self).from_state, (self.state(),)
