"""The text tokenizer of a ranker's folder, and the marks that go round its text tokens."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dalle_pytorch.errors import refuse
from dalle_pytorch.files import read_json
from dalle_pytorch.text import CleanedTokenizer, CLIPTokenizer, TextTokenizer

FILES = ("tokenizer_config.json", "special_tokens_map.json")


def openai_tokenizer(folder: Path, vocab_size: int) -> CLIPTokenizer | None:
    """CLIP's own tokenizer, if the folder's vocabulary is that one, or it has none and the model as many ids.

    Args:
        folder: with ``vocab.json``, ``tokenizer.json``, or neither.
        vocab_size: ids of the model.
    """
    tokenizer, vocab = CLIPTokenizer(), None
    if (folder / "tokenizer.json").is_file():
        content = read_json(folder / "tokenizer.json")
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        vocab = content.get("model", {}).get("vocab")
        vocab = {**vocab, **added} if isinstance(vocab, dict) else {}
    elif (folder / "vocab.json").is_file():
        vocab = read_json(folder / "vocab.json")
    if vocab is None:
        return tokenizer if vocab_size == tokenizer.vocab_size else None
    return tokenizer if vocab == tokenizer._vocab else None


def read_tokenizer(folder: Path, clean: str, vocab_size: int) -> tuple[TextTokenizer, dict[str, Any]]:
    """The tokenizer of a folder's ``tokenizer.json``.

    Args:
        folder: of a Hugging Face model.
        clean: a name of ``text.cleaned.CLEANINGS``.
        vocab_size: ids of the model.

    Returns:
        The tokenizer, and of ``PretrainedCLIPConfig`` start_id, end_id, pad_id and token_shift.

    Raises:
        ValueError: there is none, what ends a text is not known, or it has more ids than the model; names the file.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        call = "T5Tokenizer.from_pretrained(FOLDER, extra_ids=0).backend_tokenizer.save('FOLDER/tokenizer.json')"
        hint = f"; of a spiece.model transformers makes one: {call}"
        refuse(folder, f"it has no tokenizer.json{hint if (folder / 'spiece.model').is_file() else ''}")
    tokenizer = CleanedTokenizer(path, clean=clean)
    raw = Tokenizer.from_file(str(path))
    raw.no_padding()
    raw.no_truncation()
    if raw.get_vocab_size(with_added_tokens=False) > vocab_size:
        refuse(path, f"more ids than the {vocab_size} of the weights: is it another model's?")
    marks = raw.encode("").ids  # what goes round an empty text
    end, pad = special(folder, "eos_token"), special(folder, "pad_token")
    end_id = raw.token_to_id(end) if end is not None else marks[-1] if marks else None
    pad_id = raw.token_to_id(pad) if pad is not None else end_id
    if end_id is None or pad_id is None:
        refuse(path, f"it has no end mark {end or 'of texts'!r} or no padding {pad or end!r}")
    start_id = marks[0] if len(marks) == 2 and setting(folder, "add_bos_token") is not False else None
    return tokenizer, {"start_id": start_id, "end_id": end_id, "pad_id": pad_id, "token_shift": tokenizer.shift}


def special(folder: Path, name: str) -> str | None:
    """A special token that a folder's settings name."""
    value = setting(folder, name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def setting(folder: Path, name: str) -> Any:
    """A setting of a folder's tokenizer; None where it has none."""
    found = (read_json(folder / file).get(name) for file in FILES if (folder / file).is_file())
    return next((value for value in found if value is not None), None)
