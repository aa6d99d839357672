"""The tokenizer of DALL·E mini and mega: BART's byte-level BPE behind one of two ways to tidy a caption."""

import html
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import ftfy
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer

from dalle_pytorch.errors import UserError
from dalle_pytorch.files import split_lines
from dalle_pytorch.text.bpe import SPACE, ByteBPE, merge_symbols, read_merge

BOS, PAD, EOS, UNK = SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"  # BART's last id; no caption has it, and the embeddings of DALL·E mini have no row for it


class BartTokenizer(ByteBPE):
    """BART's BPE with the ids of DALL·E mini and mega.

    Captions come without <s> and </s>: the model puts them there, and an empty caption is nothing in between.

    Args:
        vocab: symbol → id, with <s> = 0, <pad> = 1, </s> = 2 and <unk>.
        merges: pairs of symbols, the first learned first.
        normalize: what happens to a caption first:
            "dalle_mini": what the models were trained with: accents and emoji spelt out, lower case, punctuation turned
            into commas; words are split as GPT-2 does.
            "min_dalle": what the package min-dalle does: emoji spelt out, lower case, other characters than ASCII
            dropped; words end at spaces only.
        words: English words, the most frequent first, by which "dalle_mini" takes hashtags apart; None = hashtags stay
            in one piece.

    Raises:
        ValueError: a vocabulary of another kind, or an unknown ``normalize``.

    Source:
        github.com/borisdayma/dalle-mini, model/text.py and tokenizer.py; github.com/kuprel/min-dalle 0.4.11,
        text_tokenizer.py. Deviation: a caption with nothing left in it is empty, where dalle-mini encodes one space.
    """

    kind = "bart"
    lowercase = True

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        normalize: str = "dalle_mini",
        words: Sequence[str] | None = None,
    ) -> None:
        if normalize not in NORMALIZERS:
            raise UserError(f"normalize must be one of {', '.join(NORMALIZERS)}, got {normalize!r}")
        vocab = {symbol: i for symbol, i in vocab.items() if symbol != MASK}
        found = [vocab.get(token) for token in (BOS, PAD, EOS)]
        if found != [0, 1, 2] or UNK not in vocab:
            raise UserError(f"vocabulary with {BOS}, {PAD}, {EOS} = {found}; BART has 0, 1, 2, and {UNK}")
        for first, second in merges:
            if left := {first, second, first + second} - vocab.keys():
                raise UserError(f"merge {first!r} {second!r} has symbols that the vocabulary lacks: {sorted(left)}")
        self.normalize, self._merges = normalize, list(merges)
        self._words = None if words is None else list(words)
        self._costs = None if words is None else word_costs(words)
        self._normalizer, pre_tokenizer = NORMALIZERS[normalize]
        super().__init__(vocab, merges, pre_tokenizer=pre_tokenizer())
        self._tokenizer.model.unk_token = UNK
        self.vocab_size = max(vocab.values()) + 1
        self._unknown = vocab[UNK]
        self._special_ids = {vocab[token] for token in SPECIAL_TOKENS}

    def clean(self, text: str) -> str:
        """The caption as ``normalize`` has it."""
        return self._normalizer(text, self._costs)

    def state(self) -> dict[str, Any]:
        """Vocabulary, merges and settings."""
        merges = [" ".join(merge) for merge in self._merges]
        return {
            "kind": self.kind,
            "normalize": self.normalize,
            "vocab": dict(self._vocab),
            "merges": merges,
            "words": self._words,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "BartTokenizer":
        """Rebuilds the tokenizer from its `state()`."""
        cls._check_state(state, {"normalize", "vocab", "merges", "words"})
        merges = [read_merge(line) for line in state["merges"]]
        return cls(state["vocab"], merges, normalize=state["normalize"], words=state["words"])

    def _encode(self, text: str) -> list[int]:
        return self._without_special(super()._encode(text))

    def _encode_with_dropout(self, text: str, dropout: float, rng: random.Random) -> list[int]:
        ids = []
        for word, _ in self._pre_tokenizer.pre_tokenize_str(text):
            symbols = merge_symbols(list(word), self._ranks, dropout, rng)
            ids += [self._vocab.get(symbol, self._unknown) for symbol in symbols]
        return self._without_special(ids)

    def _without_special(self, ids: list[int]) -> list[int]:
        """A caption that spells "<s>" has an unknown symbol there."""
        return [i if i > 2 else self._unknown for i in ids]

    def _decode(self, ids: list[int]) -> str:
        return super()._decode([i for i in ids if i not in self._special_ids and i in self._symbols])


def normalize_min_dalle(text: str, _: Mapping[str, float] | None = None) -> str:
    """min-dalle's way: emoji as words, lower case, ASCII only, one space between words."""
    text = _function("emoji", "demojize")(text, delimiters=("", ""))
    text = text.lower().encode("ascii", errors="ignore").decode()
    return " ".join(word for word in text.split(" ") if word)


# What must outlive the rule that turns punctuation into commas. Letters, so that words stay words, but none of ASCII's,
# to which unidecode brings a caption.
DOT, QUOTE, SLASH = "ḋ", "ɋ", "ꞩ"


def _compiled(*rules: tuple[str, str]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rules]


RULES = _compiled(
    (r"<person>([,\s]*(and)*[,\s]*<person>)+", " people "),  # Conceptual 12M hides names so
    (r"<person>", " a person "),
    (r"\A\s*\[\d+\]", ""),  # Wikipedia's notes
    (r"\[\d+\]\s*\Z", ""),
    (r"<[^<]+?>", " "),
    (r"http\S+", ""),
    (r"(\d),(\d{3})", r"\1\2"),
    (r"(\d),(\d{3})", r"\1\2"),  # again: digits between two commas belong to the first
    (r"(\w)\.(\w)", rf"\1{DOT}\2"),
    (r"'(?=([stdm]|ll|re|ve)\b)", QUOTE),
    (r"(\d)/(\d)", rf"\1{SLASH}\2"),
    (r"(\w)-(\w)", r"\1 \2"),
    (r"([%&/$*])", r" \1 "),
)
RULES_AFTER_HASHTAGS = _compiled(
    (r"[_#\\]", " "),
    (r"['\"`]", ' " '),
    (r"[()[\].,|:;?!=+~\-/{}]", ","),
    (DOT, "."),
    (QUOTE, "'"),
    (SLASH, "/"),
    (r"(\D)\1{3,}", r"\1"),  # four and more: "viii" is a word
    (r'\s*"[\s"]*', ' " '),
    (r"\s*,[\s,]*", ", "),
    (r"\s+", " "),
)


def normalize_dalle_mini(text: str, costs: Mapping[str, float] | None = None) -> str:
    """dalle-mini's way: ASCII in lower case, with commas and quotes for punctuation.

    Args:
        text: a caption as found.
        costs: of English words, see ``word_costs``; None = hashtags stay in one piece.

    Source:
        dalle-mini's TextNormalizer, rule by rule. Deviations: "<person>" always becomes "a person" (there at times
        "someone" or "somebody", by chance), there is no space in front (the tokenizer adds one), and an apostrophe or
        a dot in a hashtag does not break it up.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = _function("unidecode", "unidecode")(_function("emoji", "demojize")(text)).lower()
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"#(\w+)", r"\1" if costs is None else lambda tag: split_hashtag(tag[1], costs), text)
    for pattern, replacement in RULES_AFTER_HASHTAGS:
        text = pattern.sub(replacement, text)
    return text.strip().removesuffix(",").removeprefix(",").strip()


LETTER = 1000.0  # of one that is no word: more than any hashtag of words costs


def word_costs(words: Sequence[str]) -> dict[str, float]:
    """Minus the log-probability of each word but for a constant, by Zipf's law: the most frequent come first."""
    return {word.lower(): math.log(rank) for rank, word in enumerate(words, start=1)}


def split_hashtag(tag: str, costs: Mapping[str, float]) -> str:
    """The words of a hashtag."""
    return re.sub(r"[a-z0-9]+", lambda run: split_words(run[0], costs), tag)


def split_words(run: str, costs: Mapping[str, float]) -> str:
    """Words that were written without spaces: of all ways to part them the one whose costs have the least sum.

    Source:
        dalle-mini's HashtagProcessor, after the package wordninja; digits stay together. Deviation: a letter that is
        no word has a high cost, not an infinite one, after which nothing would be found.
    """
    best = [(0.0, 0)]  # of each beginning of the run: cost, and length of its last word
    for end in range(1, len(run) + 1):
        sizes = range(1, end + 1)
        words = ((costs.get(run[end - size : end], LETTER if size == 1 else math.inf), size) for size in sizes)
        best.append(min((best[end - size][0] + cost, size) for cost, size in words))
    words, end = [], len(run)
    while end:
        start = end - best[end][1]
        joined = bool(words) and run[end - 1].isdigit() and words[0][0].isdigit()
        words[:1] = [run[start:end] + words[0]] if joined else [run[start:end], *words[:1]]
        end = start
    return " ".join(words)


def read_words(path: str | Path) -> list[str]:
    """Words of a list with one a line, the most frequent first; what follows a word is not read.

    That of dalle-mini is "enwiki-words-frequency.txt" in huggingface.co/dalle-mini/dalle-mini.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty.
    """
    words = [line.split()[0] for line in split_lines(Path(path).read_text(encoding="utf-8")) if line.strip()]
    if not words:
        raise UserError(f"{path} holds no words")
    return words


PACKAGES = {"dalle_mini": ("emoji", "unidecode"), "min_dalle": ("emoji",)}
"""Small packages that only this tokenizer needs, to tidy a caption."""


def require(packages: Sequence[str]) -> None:
    """Refuse to go on without packages of PACKAGES, before weights are fetched or read in vain.

    Raises:
        UserError: one is not installed; names it.
    """
    for package in packages:
        _function(package)


def _function(package: str, name: str = "__name__") -> Any:
    try:
        return getattr(import_module(package), name)
    except ImportError as error:
        raise UserError(
            f"DALL·E mini tidies captions with {package}, which is missing: pip install {package}"
        ) from error


def _spaces() -> PreTokenizer:
    """Words end at spaces; each begins with the character of one."""
    return pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)


def _gpt2_words() -> PreTokenizer:
    """GPT-2's words; the first begins with a space too."""
    return pre_tokenizers.ByteLevel(add_prefix_space=True)


NORMALIZERS: dict[str, tuple[Callable[[str, Mapping[str, float] | None], str], Callable[[], PreTokenizer]]] = {
    "dalle_mini": (normalize_dalle_mini, _gpt2_words),
    "min_dalle": (normalize_min_dalle, _spaces),
}
"""How a caption is tidied, and where its words end."""
