"""How often greedy decoding writes every image token of a captioned picture as its tokenizer does.

Axes: b samples, n image tokens, t text tokens.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.engine import generate_image_tokens
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.dalle import DALLE

BATCH = 256  # captions decoded together; no number depends on it


@torch.no_grad()
def greedy_matches(
    dalle: DALLE, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]
) -> Bool[Tensor, "b n"]:
    """Which tokens greedy decoding of the captions gets right.

    The rainbow notebook of DALLE-pytorch (examples/rainbow_dalle.ipynb) counts the rows that are right throughout.

    Args:
        dalle: the model.
        text_tokens: captions, 0 = padding.
        image_tokens: what the tokenizer writes for their pictures.
    """
    decoder, greedy, rows = Decoder(dalle), SamplingConfig(temperature=0), []
    for text in text_tokens.split(BATCH):
        unused = torch.zeros(len(text), dalle.num_image_tokens)
        rows.append(generate_image_tokens(decoder, text, unused, greedy))
    return torch.cat(rows) == image_tokens
