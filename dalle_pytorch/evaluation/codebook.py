"""How an image tokenizer uses its codes, and what a picture costs in bits.

Axes: b pictures, n image tokens, k codebook_size.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dalle_pytorch.errors import UserError


class CodebookUse(NamedTuple):
    """Counts over all image tokens of a set of pictures."""

    used: int
    """Codes that occur."""
    dead: int
    """Codes that do not; with few tokens also codes that are merely rare."""
    perplexity: float
    """exp of the entropy of the code frequencies: 1 = one code only, codebook_size = all equally often."""
    bits_per_pixel: float
    """What a picture's tokens take at log2(codebook_size) bits each, divided by its pixels."""
    entropy_bits_per_pixel: float
    """The same with an entropy coder that knows the code frequencies of these pictures."""
    bytes_per_picture: float
    """What a picture's tokens take at log2(codebook_size) bits each."""


def codebook_use(image_tokens: Int[Tensor, "b n"], codebook_size: int, image_size: int) -> CodebookUse:
    """Usage of the codes over a set of pictures.

    Args:
        image_tokens: ids in [0, codebook_size).
        codebook_size: number of codes.
        image_size: side of the square pictures in pixels.

    Raises:
        ValueError: no tokens, or an id outside the codebook; names the numbers.
    """
    if not image_tokens.numel():
        raise UserError("no image tokens given: codebook usage needs at least one picture")
    low, high = int(image_tokens.min()), int(image_tokens.max())
    if low < 0 or high >= codebook_size:
        raise UserError(f"image tokens span [{low}, {high}], the codebook has ids 0 to {codebook_size - 1}")
    counts = torch.bincount(image_tokens.flatten().cpu(), minlength=codebook_size).double()
    shares = counts[counts > 0] / counts.sum()
    entropy = -(shares * shares.log()).sum().item()
    used, tokens = len(shares), image_tokens.shape[1]
    bits, pixels = tokens * math.log2(codebook_size), image_size**2
    return CodebookUse(
        used, codebook_size - used, math.exp(entropy), bits / pixels, tokens * entropy / math.log(2) / pixels, bits / 8
    )
