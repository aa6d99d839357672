"""How often greedy decoding writes every image token of a captioned picture as its tokenizer does.

Axes: b samples, n image tokens, t text tokens.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from dalle_pytorch.generation.generator import SamplingConfig, generate_image_tokens
from dalle_pytorch.models.dalle import DALLE

BATCH = 256  # captions decoded together; no number depends on it


@torch.no_grad()
def exact_match(dalle: DALLE, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]) -> tuple[float, float]:
    """Share of pictures with all tokens right, and share of tokens right.

    The measure of the rainbow notebook of DALLE-pytorch (examples/rainbow_dalle.ipynb).

    Args:
        dalle: the model.
        text_tokens: captions, 0 = padding.
        image_tokens: what the tokenizer writes for their pictures.
    """
    greedy, rows = SamplingConfig(temperature=0), []
    for text in text_tokens.split(BATCH):
        unused = torch.zeros(len(text), dalle.num_image_tokens)
        rows.append(generate_image_tokens(dalle, text, unused, greedy))
    right = torch.cat(rows) == image_tokens
    return right.all(dim=1).float().mean().item(), right.float().mean().item()
