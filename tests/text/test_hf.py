"""Vocabularies of others: which id is padding, and what a directory needs."""
# ruff: noqa: RUF001 (Chinese punctuation)

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from dalle_pytorch.errors import UserError
from dalle_pytorch.text import HFDirectoryTokenizer, HFTokenizer, text_tokenizer_from_state

Train = Callable[[list[str]], Tokenizer]


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_real_token_0_shifts_the_ids(hf: HFTokenizer, hf_file: Path) -> None:
    theirs = Tokenizer.from_file(str(hf_file))
    assert theirs.encode("!").ids == [0]
    assert hf.vocab_size == theirs.get_vocab_size() + 1
    assert hf.encode("a red apple!") == [i + 1 for i in theirs.encode("a red apple!").ids]
    assert hf.decode(hf.encode("a!")) == "a!"


@pytest.mark.parametrize("token", ["[PAD]", "<s>"])
def test_a_special_token_0_leaves_the_ids(token: str, tmp_path: Path, train_byte_level: Train) -> None:
    theirs = train_byte_level([token])
    ours = HFTokenizer(save(theirs, tmp_path))
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.encode("a red apple") == theirs.encode("a red apple").ids
    assert ours.decode(ours.encode(f"a {token}")) == f"a {token}"


def test_an_unknown_token_0_shifts_the_ids(tmp_path: Path) -> None:
    theirs = Tokenizer(models.WordLevel({"<unk>": 0, "cat": 1}, unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.add_special_tokens(["<unk>"])
    assert HFTokenizer(save(theirs, tmp_path)).encode("a cat") == [1, 2]


def test_an_unknown_token_0_of_a_unigram_shifts_the_ids(tmp_path: Path) -> None:
    theirs = Tokenizer(models.Unigram([("<unk>", 0.0), ("c", -1.0)], unk_id=0))
    theirs.add_special_tokens(["<unk>"])
    assert HFTokenizer(save(theirs, tmp_path)).encode("dc") == [1, 2]


def test_a_word_that_spells_padding_is_not_padding(tmp_path: Path) -> None:
    theirs = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "cat": 2}, unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs.add_special_tokens(["<pad>", "<unk>"])
    assert HFTokenizer(save(theirs, tmp_path)).encode("<pad> cat") == [2]


def test_settings_of_the_file_do_not_leak(tmp_path: Path, train_byte_level: Train) -> None:
    theirs = train_byte_level(["<pad>"])
    plain = theirs.encode("a red apple").ids
    theirs.enable_truncation(2)
    theirs.enable_padding(length=64)
    theirs.model.dropout = 0.9
    ours = HFTokenizer(save(theirs, tmp_path))
    assert all(ours.encode("a red apple") == plain for _ in range(8))


def test_dropout_is_refused(hf: HFTokenizer) -> None:
    with pytest.raises(ValueError, match="'hf' has no BPE dropout"):
        hf.encode("cat", dropout=0.1, rng=random.Random(0))


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        HFTokenizer(tmp_path / "nowhere.json")
    for content in (b"{", b'{"version": "1.0"}', b"\xff\xfe"):
        (tmp_path / "broken.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer\.json"):
            HFTokenizer(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"'hf' is not a tokenizer\.json"):
        text_tokenizer_from_state({"kind": "hf", "tokenizer": "{"})


def test_chinese_bert_keeps_its_ids_and_punctuation(hf_directory: HFDirectoryTokenizer, bert_vocab: list[str]) -> None:
    assert hf_directory.vocab_size == len(bert_vocab)
    text = "“一只红色的猫”，cats"
    ids = hf_directory.encode(text)
    assert [bert_vocab[i] for i in ids] == [*"“一只红色的猫”，", "cat", "##s"]
    assert hf_directory.decode(ids).replace(" ", "") == text
    assert hf_directory.encode("[PAD][CLS]") == [1] * 6  # "[", "PAD", "]", … are unknown


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
        ("config.json", {"model_type": "bert"}),
    ],
)
def test_directories_that_name_their_class_give_the_same(
    hf_directory: HFDirectoryTokenizer,
    bert_folder: Path,
    tmp_path: Path,
    file: str,
    content: dict[str, str],
) -> None:
    (tmp_path / "vocab.txt").write_bytes((bert_folder / "vocab.txt").read_bytes())
    (tmp_path / file).write_text(json.dumps(content))
    assert HFDirectoryTokenizer(tmp_path).encode("一只猫") == hf_directory.encode("一只猫")


def test_state_needs_neither_directory_nor_transformers(
    hf_directory: HFDirectoryTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    again = text_tokenizer_from_state(hf_directory.state())
    assert again.encode("一只猫") == hf_directory.encode("一只猫")


def test_missing_transformers_are_named(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        HFDirectoryTokenizer(bert_folder)


def test_directory_with_tokenizer_json_needs_no_transformers(
    hf: HFTokenizer, hf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert HFDirectoryTokenizer(hf_file.parent).encode("a cat") == hf.encode("a cat")


def test_directory_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        HFDirectoryTokenizer(tmp_path / "nowhere")
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds no tokenizer"):
        HFDirectoryTokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds no tokenizer"):
        HFDirectoryTokenizer(tmp_path)
