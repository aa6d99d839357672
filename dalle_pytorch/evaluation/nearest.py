"""The nearest of many rows, exactly: in 64 bits over products, chunk by chunk, each nearest pair computed anew.

Axes: q rows that are looked up, t rows of a chunk, e features, b pictures, c channels, H W pixels, _ = must equal e (an
error says so).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.evaluation.checks import check_two

ROWS = 256
"""Rows looked up at once; no number depends on it."""


class Nearest(NamedTuple):
    """The nearest row of each, so far."""

    distances: Float[Tensor, " q"]
    """Euclidean."""
    indices: Int[Tensor, " q"]
    """Places over all chunks; among equals the first."""


def nobody(count: int) -> Nearest:
    """Before any chunk: infinitely far."""
    return Nearest(torch.full((count,), torch.inf, dtype=torch.float64), torch.zeros(count, dtype=torch.long))


def nearer(found: Nearest, queries: Float[Tensor, "q e"], chunk: Float[Tensor, "t _"], first: int) -> Nearest:
    """What was found so far, or a nearer row of one more chunk. How rows are cut into chunks changes nothing.

    Args:
        found: of the chunks before.
        queries: rows to look up.
        chunk: rows to look among.
        first: how many rows came before the chunk.

    Raises:
        ValueError: no rows, unequal widths, or rows that are no numbers.
    """
    check_two(chunk, queries, least=1)
    rows, distances, indices = chunk.double(), [], []
    for part in queries.split(ROWS):
        wide = part.double()
        squares = rows.square().sum(dim=1) - 2 * wide @ rows.T  # less the part's own squares, the same along a row
        indices.append(squares.argmin(dim=1))
        distances.append((wide - rows[indices[-1]]).square().sum(dim=1).sqrt())
    distance, index = torch.cat(distances), torch.cat(indices)
    better = distance < found.distances
    return Nearest(torch.where(better, distance, found.distances), torch.where(better, index + first, found.indices))


def pixels(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
    """Pictures as rows whose Euclidean distance is the root mean square difference of their pixels."""
    rows = images.flatten(1)
    return rows / rows.shape[1] ** 0.5
