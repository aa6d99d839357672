"""Text: caption or prompt → text tokens, behind one contract."""

from dalle_pytorch.text.bart import BartTokenizer
from dalle_pytorch.text.base import TextTokenizer, clean_caption
from dalle_pytorch.text.bpe import BPETokenizer
from dalle_pytorch.text.cleaned import CleanedTokenizer
from dalle_pytorch.text.clip_bpe import CLIPTokenizer
from dalle_pytorch.text.hf import HFDirectoryTokenizer, HFTokenizer
from dalle_pytorch.text.tokenizer import KINDS, text_tokenizer_from_state

__all__ = [
    "KINDS",
    "BPETokenizer",
    "BartTokenizer",
    "CLIPTokenizer",
    "CleanedTokenizer",
    "HFDirectoryTokenizer",
    "HFTokenizer",
    "TextTokenizer",
    "clean_caption",
    "text_tokenizer_from_state",
]
