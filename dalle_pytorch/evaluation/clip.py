"""A CLIP in numbers: whether captions and pictures find each other.

Axes: b pairs, c channels, H W pixels.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.calibration import BINS, best_scale, calibration_error, choice_nats
from dalle_pytorch.evaluation.features import caption_features, clip_extractor
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Gallery, Section, Table
from dalle_pytorch.evaluation.report import Metrics, shown
from dalle_pytorch.evaluation.retrieval import clip_score, recall_at, retrieval_ranks
from dalle_pytorch.generation.grid import GridRow
from dalle_pytorch.models.two_towers import TwoTowers

RECALLS = (1, 5, 10)
SHOWN_CAPTIONS, SHOWN = 6, 8
"""Captions on the page, and pictures of each."""


def evaluate_clip(
    clip: TwoTowers, captions: Sequence[str], images: Float[Tensor, "b c H W"], measure: Measure
) -> Evaluation:
    """R@1, R@5 and R@10 both ways among all given pairs, in per cent, CLIP score of right pairs, calibration.

    Several pictures with one caption are all right answers to it, and it to each of them.

    Args:
        clip: the model.
        captions: one a picture.
        images: in [0, 1], of any size.
        measure: the protocol.

    Raises:
        ValueError: fewer than two pairs, or a clip without a text tokenizer.
    """
    if len(captions) != len(images) or len(captions) < 2:
        raise UserError(f"{len(captions)} captions given for {len(images)} pictures; at least two pairs are needed")
    names = list(dict.fromkeys(captions))
    number = {name: i for i, name in enumerate(names)}
    place = torch.tensor([number[caption] for caption in captions])
    texts, pictures = caption_features(clip, names), clip_extractor(clip)(images)
    scores, right = texts @ pictures.T, place[None] == torch.arange(len(names))[:, None]
    metrics: Metrics = {"clip_score": measure.mean(clip_score(pictures, texts[place]), better="neither")}
    rows = []
    for name, table, answers in (("text_to_image", scores, right), ("image_to_text", scores.T, right.T)):
        ranks, count = retrieval_ranks(table, answers), table.shape[1]
        for k in RECALLS:
            if count > k:
                hits = 100 * recall_at(ranks, k, count)
                metrics[f"{name}_r{k}"] = measure.mean(hits, most=100, unit="%", how={"candidates": count})
        shown_values = [shown(metrics[f"{name}_r{k}"].value) if count > k else "" for k in RECALLS]
        chance = 100 * answers.double().mean().item()
        rows.append((name.replace("_", " "), *shown_values, shown(chance), str(count)))
    if clip.logit_bias is None:  # SigLIP's scale and bias make no choice among candidates
        metrics |= calibration(scores.T, place, clip.logit_scale.item(), measure)
    head = ("", *(f"R@{k}" for k in RECALLS), "R@1 of chance", "candidates")
    sections: list[Section] = [Table("Retrieval", "In per cent.", head, rows)]
    grid = []
    for name, cosines, hits in list(zip(names, scores, right, strict=True))[:SHOWN_CAPTIONS]:
        best = cosines.argsort(descending=True, stable=True)[:SHOWN]
        labels = [f"{cosines[i]:.2f}{' right' if hits[i] else ''}" for i in best.tolist()]
        grid.append(GridRow(name, list(images[best]), labels))
    note = "Captions with the pictures that the model finds nearest, their cosines, and which of them are right."
    sections.append(Gallery("Nearest pictures", note, grid))
    return Evaluation(metrics, sections)


def calibration(scores: Float[Tensor, "b m"], right: Int[Tensor, " b"], scale: float, measure: Measure) -> Metrics:
    """The choice of a caption for each picture as probabilities: their calibration error, and the scale that fits best.

    The best scale depends on how many captions there are; training's batches may have had more or fewer.
    """
    best, how = best_scale(scores, right), {"candidates": scores.shape[1], "way": "image to text"}
    probabilities = (scale * scores.double()).softmax(dim=1)
    confidence, choice = probabilities.max(dim=1)
    error, nats = calibration_error(confidence, choice == right), choice_nats(scores, right, scale)
    count = len(scores)
    return {
        "logit_scale": measure.number(scale, count, better="neither", how=how),
        "logit_scale_best": measure.number(best, count, better="neither", how=how),
        "caption_nats": measure.mean(nats, unit="nats/picture", better="lower", how=how),
        "caption_nats_best_scale": measure.mean(
            choice_nats(scores, right, best), unit="nats/picture", better="lower", how=how
        ),
        "calibration_error": measure.number(error, count, better="lower", how={**how, "bins": BINS}),
    }
