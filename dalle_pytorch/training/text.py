"""Which text tokenizer a training uses, and where it comes from."""

import logging
from dataclasses import dataclass

from dalle_pytorch.checkpoints.checkpoint import Header
from dalle_pytorch.checkpoints.loading import read_header
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.errors import UserError
from dalle_pytorch.text import (
    BPETokenizer,
    CLIPTokenizer,
    HFDirectoryTokenizer,
    HFTokenizer,
    TextTokenizer,
    text_tokenizer_from_state,
)

log = logging.getLogger(__name__)

TOKENIZERS = ("bpe", "clip", "hf", "hf_dir")


@dataclass(kw_only=True)
class TextConfig:
    """The text tokenizer and how captions are read."""

    tokenizer: str = "bpe"
    """"bpe" (trained on the captions of the training split), "clip", "hf" (a tokenizer.json) or "hf_dir"."""
    path: str | None = None
    """The tokenizer.json of "hf", the directory of "hf_dir"."""
    tokenizer_from: str | None = None
    """A DALLE or CLIP checkpoint whose text tokenizer is taken, in place of the settings above."""
    vocab_size: int = 2048
    """"bpe": most ids, the padding and 256 bytes included (the paper: 16,384)."""
    bpe_dropout: float = 0.0
    """Share of merges left out in training, in [0, 1); the paper: 0.1."""
    truncate: bool = False
    """Cut captions longer than model.text_len; otherwise they are an error."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: an unknown tokenizer, no path where one is needed, or a dropout outside [0, 1).
        """
        if self.tokenizer not in TOKENIZERS:
            raise UserError(f"text.tokenizer must be one of {', '.join(TOKENIZERS)}, got {self.tokenizer!r}")
        if self.tokenizer in ("hf", "hf_dir") and not (self.path or self.tokenizer_from):
            raise UserError(f"text.tokenizer={self.tokenizer} needs text.path")
        if not 0 <= self.bpe_dropout < 1:
            raise UserError(f"text.bpe_dropout must lie in [0, 1), got {self.bpe_dropout}")


def make_tokenizer(config: TextConfig, data: TextImageDataModule, resumed: Header | None) -> TextTokenizer:
    """The tokenizer of a run: that of the checkpoint it resumes (its header is given), of another model, or a new one.

    Raises:
        FileNotFoundError: no file at ``path`` or ``tokenizer_from``.
        ValueError: a file that does not hold what it should.
    """
    if resumed is not None:
        return text_tokenizer_from_state(resumed["text_tokenizer"])
    if config.tokenizer_from is not None:
        state = read_header(config.tokenizer_from)["text_tokenizer"]
        if state is None:
            raise UserError(f"text.tokenizer_from={config.tokenizer_from} has no text tokenizer")
        return text_tokenizer_from_state(state)
    if config.tokenizer == "bpe":
        captions = list(data.train_set.some_captions())
        tokenizer = BPETokenizer.train(captions, config.vocab_size)
        log.info("text: byte-level BPE of %d ids from %d captions", tokenizer.vocab_size, len(captions))
        return tokenizer
    return load_tokenizer(config)


def load_tokenizer(config: TextConfig) -> TextTokenizer:
    """A tokenizer that is there already: CLIP's, or one of Hugging Face's files."""
    if config.tokenizer == "clip":
        return CLIPTokenizer()
    assert config.path is not None  # TextConfig has checked it
    return HFTokenizer(config.path) if config.tokenizer == "hf" else HFDirectoryTokenizer(config.path)
