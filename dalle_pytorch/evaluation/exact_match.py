"""How often greedy decoding writes every image token of a captioned picture as its tokenizer does.

Axes: b samples, n image tokens, t text tokens.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dalle_pytorch.generation.engine import AnyDALLE, generate_image_tokens, make_decoder
from dalle_pytorch.generation.sampling import SamplingConfig

BATCH = 256  # captions decoded together; no number depends on it


@torch.no_grad()
def greedy_matches(
    dalle: AnyDALLE, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]
) -> Bool[Tensor, "b n"]:
    """Which tokens greedy decoding of the captions gets right.

    The rainbow notebook of DALLE-pytorch (examples/rainbow_dalle.ipynb) counts the rows that are right throughout.

    Args:
        dalle: the model.
        text_tokens: captions, 0 = padding.
        image_tokens: what the tokenizer writes for their pictures.
    """
    decoder, greedy, rows = make_decoder(dalle), SamplingConfig(temperature=0.0), []
    for text in text_tokens.split(BATCH):
        unused = torch.zeros(len(text), dalle.num_image_tokens)
        rows.append(generate_image_tokens(decoder, text, unused, greedy))
    return torch.cat(rows) == image_tokens
