"""Captions that are wrong for their pictures, for losses that tell right from wrong."""

import random
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dalle_pytorch.data.samples import caption_ids
from dalle_pytorch.errors import ConfigError
from dalle_pytorch.text import TextTokenizer
from dalle_pytorch.text.phrases import held_phrase, swapped_captions


def wrong_caption(caption: str, everyones: Sequence[str], phrases: Sequence[str], rng: random.Random) -> str:
    """A caption that is not the picture's own.

    Half the time it is the own one with another phrase, where it holds one; otherwise another picture's, which may be
    true of this one by accident. Where there is no other it is the own one.

    Args:
        caption: right for its picture.
        everyones: the different captions of the batch, sorted, this one among them.
        phrases: that exclude each other; may be empty.
        rng: of the choice.
    """
    if rng.random() < 0.5 and (swapped := swapped_captions(caption, phrases)):
        return rng.choice(swapped)
    if len(everyones) < 2:
        return caption
    place = rng.randrange(len(everyones) - 1)
    return everyones[place + (everyones[place] >= caption)]  # passes its own over


def read_wrong(
    captions: Sequence[str],
    own: Sequence[str],
    tokenizer: TextTokenizer | None,
    text_len: int,
    *,
    dropout: float,
    rngs: Sequence[random.Random],
) -> tuple[Int[Tensor, "n t"], Bool[Tensor, " n"]]:
    """Tokens of wrong captions, and which of them differ from the right ones.

    They are read as the right ones are, BPE dropout included: otherwise it would tell which is which. Too long ones are
    cut, for nobody wrote them.

    Args:
        captions: the wrong ones.
        own: the right one beside each.
        tokenizer: of the model.
        text_len: columns of the tokens.
        dropout: share of BPE merges left out, in [0, 1).
        rngs: of the dropout, of each.
    """
    assert tokenizer is not None  # set before training
    plain, right = (tokenizer.tokenize(list(texts), text_len, truncate=True) for texts in (captions, own))
    tokens = plain
    if dropout:
        rows = [
            caption_ids(tokenizer, caption, text_len, truncate=True, dropout=dropout, rng=rng)
            for caption, rng in zip(captions, rngs, strict=True)
        ]
        tokens = torch.cat(rows)
    return tokens, (plain != right).any(dim=1)


def check_held(phrases: Sequence[str], captions: Iterable[str]) -> None:
    """Refuse phrases that the data do not have.

    Args:
        phrases: of the settings; without any no caption is read.
        captions: of the training data, or of a part of them where they are many.

    Raises:
        ConfigError: names those that no caption holds.
    """
    missing, seen = set(phrases), 0
    for caption in captions if phrases else ():
        missing.discard(held_phrase(caption, phrases))
        seen += 1
        if not missing:
            return
    if missing:
        raise ConfigError(
            f"contrast_phrases: none of {seen:,} training captions holds {', '.join(map(repr, sorted(missing)))} "
            "(whole words, letter by letter): name phrases as they stand there, or leave them out"
        )
