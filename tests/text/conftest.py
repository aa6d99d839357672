"""Small tokenizers of every kind, made from scratch."""

# ruff: noqa: RUF001 (captions with their own typography)

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dalle_pytorch.text import (
    BPETokenizer,
    CLIPTokenizer,
    HFDirectoryTokenizer,
    HFTokenizer,
    TextTokenizer,
)

CAPTIONS = [
    "a red apple",
    "a green apple on a table",
    "small shaded orange circle rotated clockwise",
    "smiling face with heart-eyes, Noto style",
    "flag: Côte d’Ivoire 🇨🇮",
    "eine rote Tür",
    "一只猫坐在垫子上，很可爱",
] * 4

# What a Chinese BERT has, in small.
BERT_VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"一只猫狗红色的，,“”", "cat", "##s"]


@pytest.fixture(scope="session")
def captions() -> list[str]:
    return CAPTIONS


def _train_byte_level(special_tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def train_byte_level() -> Callable[[list[str]], Tokenizer]:
    """Trains a GPT-2-like tokenizer of the library, with the special tokens first."""
    return _train_byte_level


@pytest.fixture(scope="session")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(CAPTIONS, vocab_size=400)


@pytest.fixture(scope="session")
def clip() -> CLIPTokenizer:
    return CLIPTokenizer()


@pytest.fixture(scope="session")
def hf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    _train_byte_level([]).save(str(path))
    return path


@pytest.fixture(scope="session")
def hf(hf_file: Path) -> HFTokenizer:
    return HFTokenizer(hf_file)


@pytest.fixture(scope="session")
def bert_vocab() -> list[str]:
    return BERT_VOCAB


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of bert-base-chinese, without its tokenizer.json."""
    folder = tmp_path_factory.mktemp("chinese-bert")
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCAB) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return folder


@pytest.fixture(scope="session")
def hf_directory(bert_folder: Path) -> HFDirectoryTokenizer:
    pytest.importorskip("transformers")
    return HFDirectoryTokenizer(bert_folder)


@pytest.fixture(params=["bpe", "clip", "hf", "hf_directory"])
def tokenizer(request: pytest.FixtureRequest) -> TextTokenizer:
    return request.getfixturevalue(request.param)
