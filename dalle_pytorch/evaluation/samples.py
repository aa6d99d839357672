"""The captioned pictures that an evaluation looks at: some of a split, in order, as they are."""

import random
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.factors import Factors, asked, factors_of
from dalle_pytorch.data.samples import Pictures
from dalle_pytorch.data.shards import ShardDataset
from dalle_pytorch.data.tokens import TokenShards
from dalle_pytorch.errors import UserError


class Samples(NamedTuple):
    """Captioned pictures of a split. Axes: b pictures, H W pixels."""

    images: Float[Tensor, "b 3 H W"]
    captions: list[str]
    metas: list[dict[str, Any]]
    """JSON of each."""

    @property
    def asked(self) -> list[Factors]:
        """What their captions tell."""
        return [asked(meta, caption) for meta, caption in zip(self.metas, self.captions, strict=True)]

    @property
    def factors(self) -> list[Factors]:
        """What they show."""
        return [factors_of(meta) for meta in self.metas]

    def take(self, places: list[int]) -> "Samples":
        """Those at these places, in this order."""
        return Samples(self.images[places], [self.captions[i] for i in places], [self.metas[i] for i in places])


def read_samples(
    shards: ShardDataset, data: DataConfig, image_size: int, *, most: int = 0, seed: int = 0, caption: int = 0
) -> Samples:
    """Some pictures of a split in order, unaugmented, each with one of its captions.

    Args:
        shards: the split.
        data: how pictures are read.
        image_size: side in pixels.
        most: how many, drawn by the seed; 0 = all.
        seed: of the choice.
        caption: which of a picture's captions, from 0; its last where there are fewer.

    Raises:
        UserError: they are tokens, not pictures, or one cannot be read.
    """
    if isinstance(shards, TokenShards):
        raise UserError(f"{shards.folder} holds image tokens, and this needs the pictures: set data.path= to theirs")
    pictures = Pictures(shards, replace(data, cache_decoded=False), image_size=image_size, train=False)
    samples = [pictures[index] for index in chosen(len(pictures), most, seed)]
    metas = [shards.meta(sample["index"]) for sample in samples]
    captions = [meta["captions"][: caption + 1][-1] for meta in metas]
    return Samples(torch.stack([sample["image"] for sample in samples]), captions, metas)


def chosen(count: int, most: int, seed: int) -> list[int]:
    """Up to ``most`` of ``count`` indices, drawn by the seed, in order; all for 0."""
    every = range(count)
    return list(every) if not most or most >= count else sorted(random.Random(seed).sample(every, most))


def distinct_pairs(captions: list[str], count: int, seed: int) -> list[int]:
    """Indices of up to ``count`` samples with a caption each to itself, in random order."""
    order = list(range(len(captions)))
    random.Random(seed).shuffle(order)
    first = {captions[index]: index for index in reversed(order)}
    return [index for index in order if first[captions[index]] == index][:count]
