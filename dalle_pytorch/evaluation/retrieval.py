"""Whether pictures and captions find each other: recall, R-precision, CLIP score, best of N.

Features have unit length, as a CLIP gives them. Axes: n queries, m candidates, b pictures, t captions, e features,
p prompts, _ = must equal the other argument's (an error says so).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.checks import check_rows

DISTRACTORS = 99  # Xu et al. 2018 (AttnGAN), https://arxiv.org/abs/1711.10485, section 4


def retrieval_ranks(scores: Float[Tensor, "n m"], right: Bool[Tensor, "_ _"]) -> Int[Tensor, " n"]:
    """How many wrong candidates score at least as high as the best right one, for each query; 0 = found first.

    A tie counts against the query: a model that scores everything alike finds nothing.

    Args:
        scores: of each candidate for each query.
        right: which candidates answer it, at least one each.

    Raises:
        ValueError: a query without a right candidate, unequal shapes, or scores that are no numbers.
    """
    if scores.shape != right.shape:
        raise UserError(f"scores of shape {tuple(scores.shape)} given beside answers of {tuple(right.shape)}")
    check_rows(scores, "scores", least=1)
    if not right.any(dim=1).all():
        number = int((~right.any(dim=1)).int().argmax())
        raise UserError(f"query {number} has no right candidate: its recall has no meaning; leave it out")
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


def recall_at(ranks: Int[Tensor, " n"], k: int, candidates: int) -> Float[Tensor, " n"]:
    """1 for each query whose answer is among its first k, else 0; the mean is R@k.

    Args:
        ranks: of ``retrieval_ranks``.
        k: how many are looked at.
        candidates: how many there were.

    Raises:
        ValueError: k is out of range, or there are no more candidates than k.
    """
    if k < 1:
        raise UserError(f"k must be at least 1, got {k}")
    if candidates <= k:
        raise UserError(f"R@{k} of {candidates} candidates is always 1: evaluate on more than {k} pairs")
    return (ranks < k).double()


def r_precision(
    images: Float[Tensor, "b e"],
    texts: Float[Tensor, "t _"],
    own: Int[Tensor, " _"],
    generator: torch.Generator,
    *,
    distractors: int = DISTRACTORS,
) -> Float[Tensor, " b"]:
    """1 for each picture that is nearer to its own caption than to all of some drawn others, else 0.

    Args:
        images: features of pictures.
        texts: features of captions, all different.
        own: which caption each picture is of.
        generator: source of the others.
        distractors: how many others.

    Raises:
        ValueError: too few captions, unequal widths or counts, or features that are no numbers.

    Source:
        Xu et al. 2018, https://arxiv.org/abs/1711.10485, section 4; with a CLIP: Park et al. 2021,
        https://openreview.net/forum?id=bKBhQhPeKaF.
    """
    _check_pairs(images, texts)
    if len(own) != len(images):
        raise UserError(f"{len(images)} pictures given, and which caption is whose for {len(own)}")
    if not 1 <= distractors < len(texts):
        raise UserError(
            f"distractors ({distractors}) must lie in 1 to the number of other captions ({len(texts) - 1}); evaluate "
            "on more captions, or ask for fewer distractors"
        )
    scores, hits = images @ texts.T, []
    for row, mine in zip(scores, own.tolist(), strict=True):
        others = torch.randperm(len(texts) - 1, generator=generator)[:distractors].to(row.device)
        others = others + (others >= mine)  # all but its own
        hits.append((row[mine] > row[others]).all())
    return torch.stack(hits).double()


def clip_score(images: Float[Tensor, "b e"], texts: Float[Tensor, "_ _"]) -> Float[Tensor, " b"]:
    """100 max(cosine, 0) of each picture with its caption.

    Raises:
        ValueError: unequal counts or widths, or features that are no numbers.

    Source:
        Hessel et al. 2021, https://arxiv.org/abs/2104.08718, whose weight is 2.5; 100 as torchmetrics has it.
    """
    _check_pairs(images, texts)
    if len(images) != len(texts):
        raise UserError(f"{len(images)} pictures given for {len(texts)} captions")
    return 100 * (images.double() * texts.double()).sum(dim=1).clamp_min(0)


def best_of_n(
    ranker: Float[Tensor, "p m"], judge: Float[Tensor, "_ _"], sizes: Sequence[int]
) -> Float[Tensor, "p sizes"]:
    """What the judge says of the candidate that the ranker likes best among N, from one draw of m candidates a prompt.

    The mean over all subsets of N of the m candidates, in closed form: the candidate at place i of the ranking (from 0)
    is the best of a subset in C(m - 1 - i, N - 1) of its C(m, N) cases. N = 1 is the mean, N = m the ranker's choice.

    Args:
        ranker: scores that choose; equal scores keep their order.
        judge: what is averaged; scores of another model, or the curve flatters the ranker.
        sizes: values of N, each from 1 to m.

    Raises:
        ValueError: unequal shapes, scores that are no numbers, or an N out of range.
    """
    if ranker.shape != judge.shape:
        raise UserError(f"scores of the ranker {tuple(ranker.shape)} and of the judge {tuple(judge.shape)} differ")
    check_rows(ranker, "scores of the ranker", least=1)
    check_rows(judge, "scores of the judge", least=1)
    count = ranker.shape[1]
    if any(not 1 <= size <= count for size in sizes):
        raise UserError(f"sizes {list(sizes)} must lie in 1 to the number of candidates ({count})")
    ordered = judge.double().gather(1, ranker.argsort(dim=1, descending=True, stable=True))
    columns = []
    for size in sizes:
        # P(place i + 1 is best) = P(place i is best) * (m - i - N) / (m - 1 - i), from N / m on
        chances, chance = [], size / count
        for place in range(count):
            chances.append(chance)
            chance *= max(count - place - size, 0) / max(count - 1 - place, 1)
        columns.append(ordered @ torch.tensor(chances, dtype=torch.float64, device=judge.device))
    return torch.stack(columns, dim=1)


def _check_pairs(images: Float[Tensor, "b e"], texts: Float[Tensor, "t _"]) -> None:
    if images.shape[1] != texts.shape[1]:
        raise UserError(
            f"picture features have {images.shape[1]} columns, caption features {texts.shape[1]}: take both from one "
            "clip"
        )
    check_rows(images, "picture features", least=1)
    check_rows(texts, "caption features", least=1)
