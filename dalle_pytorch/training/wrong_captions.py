"""Captions that are wrong for their pictures, for losses that tell right from wrong."""

import random
from collections.abc import Sequence

from dalle_pytorch.text.phrases import held_phrase


def swap_phrase(caption: str, phrases: Sequence[str], rng: random.Random) -> str | None:
    """The caption with another phrase in place of the one that it holds; None where it holds none.

    Args:
        caption: right for its picture.
        phrases: two or more that exclude each other.
        rng: of the choice.
    """
    held = held_phrase(caption, phrases)
    return None if held is None else caption.replace(held, rng.choice([other for other in phrases if other != held]))


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
        swapped = swap_phrase(caption, phrases, rng) if rng.random() < 0.5 else None
        wrong.append(swapped or rng.choice([other for other in captions if other != caption] or [caption]))
    return wrong
