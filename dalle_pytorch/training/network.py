"""Which network a training of stage two has: a DALLE (``model.*``), or a DALL·E mini (``bart.*``)."""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from dalle_pytorch.generation.engine import AnyDALLE
from dalle_pytorch.models.dalle import DALLE, DALLEConfig
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.models.image_tokenizer import as_image_tokenizer
from dalle_pytorch.text import BartTokenizer, TextTokenizer

if TYPE_CHECKING:
    from dalle_pytorch.training.dalle import TrainDALLEConfig


def make_network(config: "TrainDALLEConfig", vae: nn.Module, tokenizer: TextTokenizer) -> AnyDALLE:
    """The network with fresh weights, its vocabulary, grid and codebook those of the tokenizers."""
    if config.network == "dalle":
        return DALLE(replace(config.model, text_vocab_size=tokenizer.vocab_size), vae=vae)
    return DALLEBart(fitted(config.bart, vae, tokenizer), vae)


def of_config(sizes: DALLEConfig | DALLEBartConfig, vae: nn.Module) -> AnyDALLE:
    """The network of a config that is complete."""
    return DALLEBart(sizes, vae) if isinstance(sizes, DALLEBartConfig) else DALLE(sizes, vae=vae)


def fitted(bart: DALLEBartConfig, vae: nn.Module, tokenizer: TextTokenizer) -> DALLEBartConfig:
    """Sizes with the tokenizers' in their place; the begin token follows the codebook.

    BART's own tokenizer has <s>, <pad> and </s> in its vocabulary; others have none, and get two ids behind their own
    (<s> takes 0, which no caption has).
    """
    images, ids = as_image_tokenizer(vae), tokenizer.vocab_size
    codes = {
        "grid_size": images.grid_size,
        "image_vocab_size": images.codebook_size,
        "bos_id": images.codebook_size,
    }
    if isinstance(tokenizer, BartTokenizer):
        return replace(bart, **codes, text_vocab_size=ids)
    return replace(bart, **codes, text_vocab_size=ids + 2, text_bos=0, text_pad=ids, text_eos=ids + 1)
