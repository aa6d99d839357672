"""``dalle_pytorch.tokenizer`` of DALLE-pytorch, over the tokenizers of `dalle_pytorch.text`.

``HugTokenizer(path)`` reads a tokenizer.json, ``ChineseTokenizer(folder)`` a folder with bert-base-chinese, which
DALLE-pytorch downloads.
"""

import functools
from typing import Any, NoReturn

from dalle_pytorch.compat.names import missing
from dalle_pytorch.errors import UserError
from dalle_pytorch.text import CLIPTokenizer
from dalle_pytorch.text import CLIPTokenizer as SimpleTokenizer
from dalle_pytorch.text import HFDirectoryTokenizer as ChineseTokenizer
from dalle_pytorch.text import HFTokenizer as HugTokenizer

__all__ = ["ChineseTokenizer", "HugTokenizer", "SimpleTokenizer", "YttmTokenizer"]


def YttmTokenizer(*_: object) -> NoReturn:
    """Refused when it is called: the line that imports all four tokenizers is in every training script.

    Raises:
        UserError: always.
    """
    raise UserError(
        "youtokentome's files are not read here: train dalle_pytorch.text.BPETokenizer on the captions, or use a "
        "tokenizer.json (HugTokenizer)"
    )


@functools.cache
def _default() -> CLIPTokenizer:
    return CLIPTokenizer()


def __getattr__(name: str) -> Any:
    """``tokenizer``, CLIP's, read when it is asked for."""
    if name != "tokenizer":
        raise missing(__name__, name)
    return _default()
