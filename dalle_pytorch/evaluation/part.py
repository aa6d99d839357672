"""A rectangle of a picture's image tokens and its pixels: what is drawn where the rest is given.

Axes: b pictures, n image tokens, c channels, H W pixels of a picture, h w of the part.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dalle_pytorch.models.image_tokenizer import token_edges


class Part(NamedTuple):
    """A rectangle of a grid of tokens that is drawn, the rest being given."""

    grid: int
    """Token rows = columns of the picture."""
    top: int
    bottom: int
    """One past the last row."""
    left: int
    right: int
    margin: tuple[int, int] = (0, 0)
    """Of the image tokenizer: pixels that the grid reaches beyond the picture."""

    def keep(self) -> Bool[Tensor, " n"]:
        """Which tokens are given, in raster order."""
        keep = torch.ones(self.grid, self.grid, dtype=torch.bool)
        keep[self.top : self.bottom, self.left : self.right] = False
        return keep.flatten()

    def crop(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c h w"]:
        """The pixels of the part alone."""
        rows, columns = self._pixels(images)
        return images[:, :, rows, columns]

    def alone(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """The part at its place, the rest white."""
        rows, columns = self._pixels(images)
        result = torch.ones_like(images)
        result[:, :, rows, columns] = images[:, :, rows, columns]
        return result

    def without(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c H W"]:
        """The rest at its place, the part grey."""
        rows, columns = self._pixels(images)
        result = images.clone()
        result[:, :, rows, columns] = 0.6
        return result

    def _pixels(self, images: Float[Tensor, "b c H W"]) -> tuple[slice, slice]:
        edges = token_edges(images.shape[-1], self.grid, self.margin)
        return slice(edges[self.top], edges[self.bottom]), slice(edges[self.left], edges[self.right])
