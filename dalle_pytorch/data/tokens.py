"""Token shards: the image tokens of pictures, worked out once by an image tokenizer, with their captions.

A sample is ``<key>.npy``, ``[variants, n]`` in the smallest integer type that holds the codebook, and ``<key>.json`` as
in the image shards. The index says which image tokenizer they are of.
"""

import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from dalle_pytorch.data.index import read_index
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.errors import UserError

TYPES: tuple[type[np.integer[Any]], ...] = (np.uint8, np.uint16, np.int32)
TOKENIZER_KEYS = ("kind", "config_sha256", "weights_sha256", "codebook_size", "grid_size", "image_size")


def smallest_type(codebook_size: int) -> np.dtype[Any]:
    """The smallest of the types that holds every code."""
    return np.dtype(next(kind for kind in TYPES if codebook_size - 1 <= np.iinfo(kind).max))


class TokenShards(ShardDataset):
    """The samples of one split of token shards, or of several.

    Args:
        folder: as ``prepare_data.py source=shards`` writes it.
        split: the name of a split, or several joined by "+".

    Raises:
        FileNotFoundError: the folder, its index or a shard is missing.
        ValueError: no such split, a broken shard, or an index without the image tokenizer.
    """

    KIND: ClassVar[str] = "tokens"
    EXTENSIONS: ClassVar[tuple[str, ...]] = ("npy",)

    def __init__(self, folder: str | Path, split: str) -> None:
        super().__init__(folder, split)
        self.tokenizer: dict[str, Any] = self.index.get("tokenizer", {})
        """The image tokenizer: kind, hashes of its settings and weights, codebook_size, grid_size, image_size."""
        if missing := [key for key in TOKENIZER_KEYS if key not in self.tokenizer]:
            raise UserError(f"the index of {self.folder} lacks {missing} of its image tokenizer; encode it again")

    def tokens(self, index: int) -> Int[Tensor, "variants n"]:
        """The image tokens of a sample, one row for each augmentation.

        Raises:
            ValueError: they cannot be read, or are not of the grid or codebook of the index; names the sample.
        """
        sample = self[index]
        tokens = read_tokens(sample.image, sample.key)
        count, size = self.tokenizer["grid_size"] ** 2, self.tokenizer["codebook_size"]
        if tokens.shape[1] != count:
            raise UserError(f"{sample.key!r} has {tokens.shape[1]} image tokens, the grid {count}")
        if tokens.max() >= size:
            raise UserError(f"{sample.key!r} has image tokens up to {tokens.max()}, the codebook {size}")
        return tokens


def read_tokens(data: bytes, name: str) -> Int[Tensor, "variants n"]:
    """Image tokens from the bytes of an ``.npy`` file.

    Args:
        data: the file.
        name: what to call it in an error.

    Raises:
        ValueError: no such file, or something else than rows of whole numbers from 0 on; names it.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
        usable = array.ndim == 2 and array.size > 0 and array.dtype.kind in "iu" and array.min() >= 0
    except Exception as error:  # a broken header can break numpy's parser in any way
        raise UserError(f"the image tokens of {name!r} cannot be read: {error}") from error
    if not usable:
        raise UserError(f"{name!r} holds {array.dtype} of shape {array.shape}, not rows of image tokens")
    return torch.from_numpy(array.astype(np.int64))


def open_shards(folder: str | Path, split: str) -> ShardDataset:
    """The samples of a split, of pictures or of tokens, as its index says."""
    kind = TokenShards if read_index(folder, kind=None)["kind"] == TokenShards.KIND else ShardDataset
    return kind(folder, split)
