"""Whether a model tells phrases apart that exclude each other, such as the names of styles.

Axes: b pictures, k phrases.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Table
from dalle_pytorch.evaluation.report import shown
from dalle_pytorch.text.phrases import exchange, held_phrase

Score = Callable[[Sequence[int], Sequence[str]], Float[Tensor, " b"]]
"""How well captions fit pictures, given by their places; more is better."""


def evaluate_phrases(score: Score, captions: Sequence[str], phrases: Sequence[str], measure: Measure) -> Evaluation:
    """How often a picture's caption fits it better than the same with each of the other phrases.

    Args:
        score: of the model.
        captions: of the pictures, as check_held_out lets pass; those without a phrase do not count.
        phrases: two or more.
        measure: the protocol.
    """
    held = {place: phrase for place, caption in enumerate(captions) if (phrase := held_phrase(caption, phrases))}
    places = list(held)
    asked = [[exchange(captions[place], held[place], phrase) for place in places] for phrase in phrases]
    scores = torch.stack([score(places, texts) for texts in asked], dim=1)
    own = torch.tensor([phrases.index(phrase) for phrase in held.values()])
    # a tie, as of captions that are cut before the phrase, counts against the model
    others = scores.scatter(1, own[:, None], -torch.inf)
    best = torch.where(scores.gather(1, own[:, None])[:, 0] > others.amax(dim=1), own, others.argmax(dim=1))
    told = measure.mean((best == own).float(), most=1, how={"phrases": ", ".join(phrases)})
    rows = []
    for number, phrase in enumerate(phrases):
        taken = best[own == number].bincount(minlength=len(phrases))
        rows.append((phrase, *(str(count) for count in taken.tolist())))
    note = (
        "Pictures: a row for the phrase of the caption, a column for the one that fits best. Right is a share of "
        f"{shown(told.value)}; chance is {shown(1 / len(phrases))}."
    )
    return Evaluation({"phrases_told": told}, [Table("Phrases told apart", note, ("", *phrases), rows)])


def check_held_out(captions: Sequence[str], phrases: Sequence[str]) -> None:
    """Refuse captions that hold hardly any of the phrases.

    Raises:
        ValueError: fewer than two do.
    """
    count = sum(held_phrase(caption, phrases) is not None for caption in captions)
    if phrases and count < 2:
        raise UserError(
            f"{count} of {len(captions)} captions hold one of phrases={list(phrases)}: give those of the data, "
            "and caption= for the captions that have them"
        )
