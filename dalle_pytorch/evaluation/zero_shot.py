"""A CLIP as a classifier that was never trained to be one: classes are captions.

Axes: b pictures, k classes, t captions, e features, c channels, H W pixels.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.data.factors import Factors
from dalle_pytorch.evaluation.features import caption_features, clip_extractor
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Section, Table
from dalle_pytorch.evaluation.report import Metrics, shown
from dalle_pytorch.evaluation.retrieval import recall_at, retrieval_ranks
from dalle_pytorch.models.two_towers import TwoTowers

TOPS = (1, 5)


def evaluate_zero_shot(
    clip: TwoTowers,
    images: Float[Tensor, "b c H W"],
    factors: Sequence[Factors],
    captions: Mapping[str, Mapping[str, Sequence[str]]],
    measure: Measure,
) -> Evaluation:
    """Top-1 and top-5 accuracy in per cent, factor by factor; nothing where the data know none.

    Args:
        clip: the model.
        images: in [0, 1].
        factors: what each picture shows.
        captions: of each value of each factor; several are averaged. The values are the classes.
        measure: the protocol.

    Source:
        Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 3.1; the average over captions: 3.1.4.
    """
    names = list(dict.fromkeys(name for values in captions.values() for group in values.values() for name in group))
    if not names:
        return Evaluation({}, [])
    texts = dict(zip(names, caption_features(clip, names), strict=True))
    pictures = clip_extractor(clip)(images)
    metrics: Metrics = {}
    rows = []
    for factor, values in captions.items():
        classes = {value: place for place, value in enumerate(values)}
        places = [place for place, row in enumerate(factors) if row.get(factor) in classes]
        if len(classes) < 2 or len(places) < 2:
            continue
        table = class_features([[texts[name] for name in group] for group in values.values()])
        own = torch.tensor([classes[factors[place][factor]] for place in places])
        right = own[:, None] == torch.arange(len(classes))
        ranks = retrieval_ranks(pictures[places] @ table.T, right)
        how = {"classes": len(classes), "captions": sum(len(group) for group in values.values())}
        cells = []
        for k in TOPS:
            key = f"zero_shot_{factor}_top{k}"
            if len(classes) > k:
                metrics[key] = measure.mean(100 * recall_at(ranks, k, len(classes)), unit="%", how=how)
            cells += [shown(metrics[key].value), shown(100 * k / len(classes))] if key in metrics else ["", ""]
        rows.append((factor, *cells, str(len(classes)), str(len(places))))
    head = ("", *(name for k in TOPS for name in (f"top {k}", f"chance of top {k}")), "classes", "pictures")
    note = "In per cent: pictures whose class, written as captions, is the nearest, or among the nearest five."
    sections: list[Section] = [Table("Zero-shot classification", note, head, rows)] if rows else []
    return Evaluation(metrics, sections)


def class_features(groups: Sequence[Sequence[Float[Tensor, " e"]]]) -> Float[Tensor, "k e"]:
    """The mean of each class's captions, of unit length."""
    return F.normalize(torch.stack([torch.stack(list(group)).mean(dim=0) for group in groups]), dim=1)
