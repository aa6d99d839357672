"""Whether a model tells phrases apart that exclude each other, such as the names of styles.

Axes: b pictures, k phrases.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Table
from dalle_pytorch.evaluation.report import shown
from dalle_pytorch.text.phrases import held_phrase

Score = Callable[[Sequence[int], Sequence[str]], Float[Tensor, " b"]]
"""How well captions fit pictures, given by their places; more is better."""


def evaluate_phrases(score: Score, captions: Sequence[str], phrases: Sequence[str], measure: Measure) -> Evaluation:
    """How often a picture's caption fits it better than the same with each of the other phrases.

    Args:
        score: of the model.
        captions: of the pictures; those without a phrase do not count.
        phrases: two or more.
        measure: the protocol.

    Raises:
        ValueError: fewer than two captions hold a phrase.
    """
    held = {place: phrase for place, caption in enumerate(captions) if (phrase := held_phrase(caption, phrases))}
    if len(held) < 2:
        raise ValueError(
            f"{len(held)} of {len(captions)} captions hold one of phrases={list(phrases)}: give those of the data, "
            "and caption= for the captions that have them"
        )
    places = list(held)
    scores = torch.stack(
        [score(places, [captions[place].replace(held[place], phrase) for place in places]) for phrase in phrases], dim=1
    )
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
