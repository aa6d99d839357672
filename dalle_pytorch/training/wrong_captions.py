"""Captions that are wrong for their pictures, for losses that tell right from wrong."""

import random
from collections.abc import Sequence

from dalle_pytorch.text.phrases import held_phrase


def swapped_captions(caption: str, phrases: Sequence[str]) -> list[str]:
    """The caption with each other phrase in place of the one that it holds; none where it holds none.

    Args:
        caption: right for its picture.
        phrases: two or more that exclude each other.
    """
    held = held_phrase(caption, phrases)
    return [] if held is None else [caption.replace(held, other) for other in phrases if other != held]


def wrong_captions(captions: Sequence[str], phrases: Sequence[str], rng: random.Random) -> list[str]:
    """A caption for each picture of a batch that is not its own.

    Half the time the own one with another phrase, where it holds one; otherwise another picture's. A picture keeps its
    own where all captions of the batch are equal.

    Args:
        captions: of the batch.
        phrases: that exclude each other; may be empty.
        rng: of the choice.
    """
    wrong = []
    for caption in captions:
        swapped = swapped_captions(caption, phrases) if rng.random() < 0.5 else []
        wrong.append(rng.choice(swapped or [other for other in captions if other != caption] or [caption]))
    return wrong
