"""The attention patterns: which key each position of a stream may read.

A stream is ``text_length`` text positions (the <bos> included) and then the image tokens in raster order. Every image
position sees the whole text; the text is causal; a pattern says which earlier image positions an image position sees.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from dalle_pytorch.errors import UserError

PATTERNS = ("full", "axial_row", "axial_col", "conv_like")
SEMANTICS = ("paper", "dalle_pytorch")


def pattern_mask(
    pattern: str, text_length: int, grid_size: int, *, semantics: str = "paper", kernel: int = 11
) -> Bool[Tensor, "s s"]:
    """Which key each query may read, True = visible; never the future.

    Args:
        pattern: "full" (all that came before), "axial_row", "axial_col" or "conv_like".
        text_length: text positions in front of the image, the <bos> included.
        grid_size: token rows = columns, w below.
        semantics: "paper": row = itself and the previous w tokens in raster order, across row borders; convolution =
            the causal half of a centred kernel, wrapping around row borders. "dalle_pytorch": row = earlier tokens of
            the same row; convolution = the kernel x kernel tokens up and to the left, without wrap. Columns are alike.
        kernel: side of the convolution's kernel, odd for "paper".

    Returns:
        ``[s, s]`` with s = text_length + grid_size ** 2.

    Raises:
        ValueError: unknown pattern or semantics, or an even kernel under "paper".

    Source:
        Ramesh et al. 2021, appendix B.1 (rows, columns, 11 x 11 convolution); DALLE-pytorch 1.6.6, attention.py.
    """
    if pattern not in PATTERNS:
        raise UserError(f"attention pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    if semantics not in SEMANTICS:
        raise UserError(f"attn_semantics must be one of {', '.join(SEMANTICS)}, got {semantics!r}")
    if semantics == "paper" and kernel % 2 == 0:
        raise UserError(f"conv_kernel must be odd to have a centre, got {kernel}")
    length = text_length + grid_size**2
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if pattern == "full":
        return causal

    position = torch.arange(grid_size**2)
    row, col = position // grid_size, position % grid_size
    behind = position[:, None] - position[None, :]  # how far the key lies behind the query in raster order
    if pattern == "axial_col":
        visible = col[:, None] == col[None, :]
    elif pattern == "axial_row":
        visible = behind <= grid_size if semantics == "paper" else row[:, None] == row[None, :]
    elif semantics == "paper":
        half = kernel // 2
        # offset = up * w + left with up in 0..half, left in -half..half: raster arithmetic wraps at the borders
        offsets = {up * grid_size + left for up in range(half + 1) for left in range(-half, half + 1)}
        visible = torch.isin(behind, torch.tensor(sorted(offsets)))
    else:
        up, left = row[:, None] - row[None, :], col[:, None] - col[None, :]
        visible = (up >= 0) & (up < kernel) & (left >= 0) & (left < kernel)
    mask = causal.clone()
    mask[text_length:, text_length:] &= visible
    return mask
