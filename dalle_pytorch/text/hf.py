"""Hugging Face vocabularies: a `tokenizer.json`, or a directory such as Chinese BERT's."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from dalle_pytorch.errors import UserError
from dalle_pytorch.text.base import PAD, TextTokenizer, clean_caption


class HFTokenizer(TextTokenizer):
    """A tokenizer of the `tokenizers` library; its own normaliser decides about case.

    Ids are those of the file where its id 0 is a special token that no caption encodes to
    (`[PAD]`, `<s>`). Otherwise id 0 is a real token, or the one for unknown characters, and all
    ids are one higher than in the file: else rare captions would contain padding.

    The padding, truncation and dropout that a file may ask for are switched off: the first two are
    `tokenize`'s, and the last cannot be seeded.

    Args:
        path: a `tokenizer.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no tokenizer.
    """

    kind = "hf"

    def __init__(self, path: str | Path) -> None:
        self._load(_read_text(Path(path)), str(path))

    def clean(self, text: str) -> str:
        """The caption as this tokenizer sees it; typography stays, see `clean_caption`."""
        return clean_caption(text, plain_typography=False)

    def state(self) -> dict[str, Any]:
        """The whole of the `tokenizer.json`, so that the file is not needed again."""
        return {"kind": self.kind, "tokenizer": self._json}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "HFTokenizer":
        """Rebuilds the tokenizer from its `state()`, without its file or directory."""
        cls._check_state(state, {"tokenizer"})
        tokenizer = cls.__new__(cls)
        tokenizer._load(state["tokenizer"], f"the state of a tokenizer {cls.kind!r}")
        return tokenizer

    def _load(self, text: str, source: str) -> None:
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise UserError(f"{source} is not a tokenizer.json: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.dropout = None
        tokenizer.encode_special_tokens = True  # "[PAD]" in a caption is text
        self._tokenizer = tokenizer
        self._json = tokenizer.to_str()
        self.shift: int = 0 if _padding_is_free(json.loads(self._json)) else 1
        """How much higher the ids are than the file's."""
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1 + self.shift

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        # A model that takes whole words can still meet one that spells its padding token.
        return [i + self.shift for i in ids if i + self.shift != PAD]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode([i - self.shift for i in ids], skip_special_tokens=True)


class HFDirectoryTokenizer(HFTokenizer):
    """The tokenizer of a Hugging Face model directory (Chinese BERT and the like).

    Reads its `tokenizer.json` where it has one; otherwise `transformers` converts what is there
    (`vocab.txt`, `sentencepiece`, …). The state holds the result: a checkpoint needs
    neither the directory nor `transformers`. Ids are those of `HFTokenizer`.

    Args:
        path: a local directory; nothing is downloaded.

    Raises:
        FileNotFoundError: there is no such directory.
        UserError: `transformers` is needed and not installed.
        ValueError: the directory holds no tokenizer.
    """

    kind = "hf_directory"

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"no tokenizer directory at {path}")
        file = path / "tokenizer.json"
        self._load(_read_text(file) if file.exists() else _convert(path), str(path))


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file at {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a tokenizer.json: {error}") from error


def _padding_is_free(spec: dict[str, Any]) -> bool:
    """Whether the file's id 0 is special and not what unknown characters become."""
    special = {t["id"]: t["content"] for t in spec["added_tokens"] if t["special"]}
    model = spec["model"]
    if model["type"] == "Unigram":  # has an unk_id instead of an unk_token
        return PAD in special and model.get("unk_id") != PAD
    return PAD in special and model.get("unk_token") != special[PAD]


def _convert(path: Path) -> str:
    try:
        from transformers import AutoTokenizer, BertTokenizer
    except ImportError as error:
        raise UserError(
            f"{path} has no tokenizer.json; converting it needs transformers: pip install transformers"
        ) from error
    try:
        loader = BertTokenizer if _is_bert_vocabulary(path) else AutoTokenizer
        tokenizer: Any = loader.from_pretrained(str(path), local_files_only=True)
        return tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # whatever the many tokenizers of transformers raise
        raise UserError(f"{path} holds no tokenizer that transformers can read: {error}") from error


def _is_bert_vocabulary(path: Path) -> bool:
    """Whether a directory that names no class has BERT's vocab.txt (bert-base-chinese's is so)."""
    if not (path / "vocab.txt").exists() or (path / "config.json").exists():
        return False
    file = path / "tokenizer_config.json"
    return not file.exists() or "tokenizer_class" not in json.loads(file.read_text("utf-8"))
