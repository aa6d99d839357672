"""Held-out pictures and captions for the arms."""

import random
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from omegaconf import OmegaConf
from torch import Tensor

from dalle_pytorch.data.datamodule import DataConfig, open_split
from dalle_pytorch.data.samples import Pictures
from dalle_pytorch.data.tokens import TokenShards

EMOJI = "data/emoji"
"""The bundled pictures, part of a checkout."""
HELD_OUT = "val+test_compose"
"""417 pictures of known concepts that no training sees."""


class Captioned(NamedTuple):
    """Pictures in [0, 1] and their first captions."""

    images: Float[Tensor, "b 3 H W"]
    captions: list[str]


def read(path: str, split: str, image_size: int, *, most: int = 0, seed: int = 0) -> Captioned:
    """Pictures of a split in order, resized; ``most`` of them drawn by the seed, 0 = all.

    Raises:
        FileNotFoundError: no such folder, or the run was not started in a checkout.
        ValueError: the folder holds tokens.
    """
    shards = open_split(path, split, "data.path")
    if isinstance(shards, TokenShards):
        raise ValueError(f"{path} holds image tokens, and this needs the pictures")
    pictures = Pictures(shards, DataConfig(path=path, resize=True), image_size=image_size, train=False)
    places = list(range(len(pictures)))
    if most and most < len(places):
        places = sorted(random.Random(seed).sample(places, most))
    found = [pictures[place] for place in places]
    return Captioned(torch.stack([each["image"] for each in found]), [each["caption"] for each in found])


def data_path(run: Path) -> str:
    """Where a training read its data, from the settings in its folder."""
    return str(OmegaConf.load(run / "config.yaml").data.path)
