"""Held-out pictures and captions for the arms."""

from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.splits import open_split
from dalle_pytorch.evaluation.samples import Samples, read_samples

EMOJI = "data/emoji"
"""The bundled pictures, part of a checkout."""
HELD_OUT = "val+test_compose"
"""417 pictures of known concepts that no training sees."""


def read(path: str, split: str, image_size: int, *, most: int = 0, seed: int = 0, caption: int = 0) -> Samples:
    """Pictures of a split, resized; ``most`` of them drawn by the seed, 0 = all.

    Args:
        path: folder of shards.
        split: one, or several joined by "+".
        image_size: of the model.
        most: so many pictures.
        seed: of their choice.
        caption: which of a picture's captions: of the emoji's the first is the name alone, the second has the style.

    Raises:
        FileNotFoundError: no such folder, or the run was not started in a checkout.
        ValueError: the folder holds tokens.
    """
    data = DataConfig(path=path, resize=True)
    return read_samples(open_split(path, split, "data.path"), data, image_size, most=most, seed=seed, caption=caption)
