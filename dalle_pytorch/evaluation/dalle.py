"""A DALLE in numbers: likelihood of held-out pairs, and what its pictures are worth to judges.

Axes: b samples, t text tokens, n image tokens, p prompts, m candidates of a prompt, c channels, H W pixels, e features.
"""

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.distribution import inception_score
from dalle_pytorch.evaluation.features import Extractor, blurred, caption_features, clip_extractor
from dalle_pytorch.evaluation.likelihood import likelihoods, other_captions, unigram_nats, unigram_text_nats
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Gallery, Line, Plot, Section, Table
from dalle_pytorch.evaluation.report import Metric, Metrics, Protocol, shown
from dalle_pytorch.evaluation.retrieval import DISTRACTORS, best_of_n, clip_score, r_precision
from dalle_pytorch.evaluation.shares import in_parts
from dalle_pytorch.generation.generator import Candidates, Generator
from dalle_pytorch.generation.grid import GridRow
from dalle_pytorch.generation.rerank import Scorer, score
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.text_to_image import TextToImage
from dalle_pytorch.models.two_towers import TwoTowers

SHOWN_PROMPTS, SHOWN = 6, 7
"""Prompts on the page, and pictures of each."""


class Pairs(NamedTuple):
    """Captioned pictures as tokens."""

    captions: list[str]
    text_tokens: Int[Tensor, "b t"]
    image_tokens: Int[Tensor, "b n"]


def evaluate_likelihood(
    dalle: TextToImage, pairs: Pairs, train: Pairs, measure: Measure, *, trained: Protocol = MappingProxyType({})
) -> Evaluation:
    """Nats per image token, text token and pixel, beside a unigram model and the same model with others' captions.

    The gains are paired: of each sample, what knowing the caption, or more than frequencies, saves.

    Args:
        dalle: the model.
        pairs: held-out samples, at least two.
        train: samples for the frequencies of the unigram models.
        measure: the protocol.
        trained: which samples ``train`` are.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(pairs.captions) < 2:
        raise UserError(f"{len(pairs.captions)} samples given: shuffling captions needs at least two")
    own = likelihoods(dalle, pairs.text_tokens, pairs.image_tokens)
    shuffled = likelihoods(dalle, other_captions(pairs.text_tokens), pairs.image_tokens).image
    unigram = unigram_nats(train.image_tokens, pairs.image_tokens, dalle.codebook_size)
    tokens, trained = dalle.num_image_tokens, {**trained, "unigram_samples": len(train.captions)}
    unit = "nats/token"

    def mean(nats: Tensor, better: str = "lower", how: Protocol | None = None) -> Metric:
        return measure.mean(nats / tokens, unit=unit, better=better, how={"image_tokens": tokens, **(how or {})})

    metrics = {
        "image_nats": mean(own.image),
        "image_nats_unigram": mean(unigram, how=trained),
        "image_nats_shuffled_captions": mean(shuffled),
        "gain_over_unigram": mean(unigram - own.image.double(), "higher", trained),
        "gain_of_caption": mean(shuffled - own.image, "higher"),
        "image_bits_per_pixel": measure.mean(
            own.image / math.log(2) / dalle.vae.image_size**2, unit="bits/pixel", better="lower", how={"of": "tokens"}
        ),
    }
    rows = [
        (
            "image tokens",
            *(shown(metrics[f"image_nats{name}"].value) for name in ("", "_unigram", "_shuffled_captions")),
        )
    ]
    if own.text is not None and own.text_tokens is not None:
        vocab, length = dalle.config.text_vocab_size, dalle.config.text_len
        known, held_out = ([[i for i in row if i] for row in p.text_tokens.tolist()] for p in (train, pairs))
        metrics["text_nats"] = measure.mean(own.text, weights=own.text_tokens, unit=unit, better="lower")
        nats, counts = unigram_text_nats(known, held_out, vocab, length)
        # A model without <bos> does not predict the first token: the two would be of unequal tokens.
        if torch.equal(counts, own.text_tokens.double()):
            metrics["text_nats_unigram"] = measure.mean(nats, weights=counts, unit=unit, better="lower", how=trained)
            rows.append(
                ("text tokens", shown(metrics["text_nats"].value), shown(metrics["text_nats_unigram"].value), "")
            )
    note = "Nats per token on held-out pairs. A model that uses captions does worse with another picture's."
    head = ("", "model", "unigram", "captions shuffled")
    return Evaluation(metrics, [Table("Likelihood", note, head, rows)])


TOGETHER = 64
"""Candidates drawn together where several prompts share a micro-batch."""


class Draw(NamedTuple):
    """Candidates of several prompts."""

    prompts: list[str]
    images: Float[Tensor, "p m c H W"]
    """In [0, 1]."""
    ranks: Float[Tensor, "p m"] | None
    """Scores of the ranker; None without one."""


def draw(
    dalle: TextToImage,
    prompts: Sequence[str],
    *,
    num_candidates: int,
    seed: int,
    sampling: SamplingConfig,
    ranker: Scorer | None = None,
    progress: Callable[[int], object] = lambda drawn: None,
) -> Draw:
    """So many candidates of each prompt; each is a function of (prompt, seed, index)."""
    generator, indices = Generator(dalle), range(num_candidates)

    def of_prompts(some: Sequence[str]) -> list[tuple[Tensor, Tensor | None]]:
        found: dict[int, list[Tensor]] = {}
        for number, event in generator.sample_each(
            some, indices, seed=seed, sampling=sampling, truncate=True, progress=progress
        ):
            assert isinstance(event, Candidates)  # no previews were asked for
            found.setdefault(number, []).append(event.images)
        images = [torch.cat(found[number]) for number in range(len(some))]
        if ranker is None:
            return [(own, None) for own in images]
        return [(own, score(own, prompt, [ranker])[0]) for own, prompt in zip(images, some, strict=True)]

    size = max(TOGETHER // num_candidates, 1)  # not the machine's micro-batch: parts are the same everywhere
    together = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    parts = [part for found in in_parts(of_prompts, together) for part in found]
    ranks = [rank for _, rank in parts if rank is not None]
    return Draw(list(prompts), torch.stack([images for images, _ in parts]), torch.stack(ranks) if ranks else None)


def evaluate_drawn(
    drawn: Draw,
    real: Float[Tensor, "r c H W"],
    own: Float[Tensor, "p c H W"],
    measure: Measure,
    *,
    judge: TwoTowers | None = None,
    captions: Sequence[str] = (),
    extractors: Sequence[Extractor] = (),
    logits: Extractor | None = None,
    blurs: Sequence[float] = (0.0,),
    how: Protocol,
) -> Evaluation:
    """What drawn pictures are worth.

    Args:
        drawn: candidates of prompts, with the ranker's scores for the best-of-N curve.
        real: pictures of the split, for distances.
        own: the real picture of each prompt, for its scores.
        measure: the protocol.
        judge: a CLIP other than the ranker: CLIP score, R-precision, best of N.
        captions: all different captions of the split, the prompts among them; R-precision draws others from these.
        extractors: for FID and the like between real and all drawn pictures.
        logits: class scores for the Inception score.
        blurs: radii of Gaussian filters before the extractors, 0 = none (see features.blurred).
        how: how the candidates were drawn.
    """
    metrics: Metrics = {}
    sections: list[Section] = []
    flat, count = drawn.images.flatten(0, 1), drawn.images.shape[1]
    if judge is not None:
        found = judged(drawn, own, measure, judge, captions, how)
        metrics |= found.metrics
        sections += found.sections
    for extractor in extractors:
        if min(len(real), len(flat)) > 3:
            for radius in blurs:
                seen, suffix = blurred(extractor, radius), f"_blur_{radius:g}" if radius else ""
                metrics |= measure.distances(seen(real), seen(flat), seen, suffix=suffix, group=count, how=how)
    if logits is not None and len(flat) > 1:
        value = inception_score(logits(flat))
        metrics["inception_score"] = measure.number(value, len(flat), extractor=logits, how={**how, "splits": 1})
    order = torch.arange(count).expand(len(drawn.prompts), -1)
    if drawn.ranks is not None:
        order = drawn.ranks.argsort(dim=1, descending=True, stable=True)
    rows = []
    for number, prompt in enumerate(drawn.prompts[:SHOWN_PROMPTS]):
        places = order[number, :SHOWN]
        labels = ["real", *(f"#{i}" for i in places.tolist())]
        rows.append(GridRow(prompt, [own[number], *drawn.images[number, places]], labels))
    ranked = "best first as the ranker sees them" if drawn.ranks is not None else "in the order drawn"
    note = f"The real picture, then candidates, {ranked}."
    return Evaluation(metrics, [Gallery("Pictures", note, rows), *sections])


def judged(
    drawn: Draw,
    own: Float[Tensor, "p c H W"],
    measure: Measure,
    judge: TwoTowers,
    captions: Sequence[str],
    how: Protocol,
) -> Evaluation:
    """CLIP score and R-precision of the judge, and both for the best of N where a ranker chose."""
    extractor = clip_extractor(judge)
    prompts, count = drawn.images.shape[:2]
    texts = caption_features(judge, captions)
    place = torch.tensor([captions.index(prompt) for prompt in drawn.prompts])
    features, real = extractor(drawn.images.flatten(0, 1)), extractor(own)
    scores = clip_score(features, texts[place].repeat_interleave(count, dim=0)).view(prompts, count)
    same = {key: how[key] for key in ("seed", "prompts") if key in how}  # of real pictures no sampling counts
    metrics = {
        "clip_score": measure.mean(scores.mean(dim=1), better="higher", extractor=extractor, how=how),
        "clip_score_real": measure.mean(
            clip_score(real, texts[place]), better="neither", extractor=extractor, how=same
        ),
    }
    values = {"clip_score": ("CLIP score", scores)}
    if (distractors := min(DISTRACTORS, len(captions) - 1)) > 0:
        hits = r_precision(
            features, texts, place.repeat_interleave(count), measure.generator(), distractors=distractors
        ).view(prompts, count)
        real_hits = r_precision(real, texts, place, measure.generator(), distractors=distractors)
        among: Protocol = {"distractors": distractors}
        metrics["r_precision"] = measure.mean(hits.mean(dim=1), most=1, extractor=extractor, how={**how, **among})
        metrics["r_precision_real"] = measure.mean(
            real_hits, most=1, better="neither", extractor=extractor, how={**same, **among}
        )
        values["r_precision"] = ("R-precision", hits)
    sections: list[Section] = []
    if drawn.ranks is not None:
        sizes = [2**power for power in range(count.bit_length()) if 2**power <= count]
        for name, (title, each) in values.items():
            curve = best_of_n(drawn.ranks, each, sizes)
            points = [
                measure.mean(
                    curve[:, i],
                    most=1 if name == "r_precision" else None,
                    extractor=extractor,
                    how={**how, **metrics[name].protocol, "best_of": size},
                )
                for i, size in enumerate(sizes)
            ]
            metrics |= {f"{name}_best_of_{size}": point for size, point in zip(sizes, points, strict=True)}
            sections.append(curve_plot(title, sizes, points, metrics[f"{name}_real"]))
    return Evaluation(metrics, sections)


def curve_plot(
    title: str, sizes: Sequence[int], points: Sequence[Metric], real: Metric, judge: str = "another CLIP"
) -> Plot:
    """Best of N and the real pictures, with their intervals."""

    def line(name: str, metrics: Sequence[Metric]) -> Line:
        ends = [metric.interval or (metric.value, metric.value) for metric in metrics]
        return Line(name, [metric.value for metric in metrics], [low for low, _ in ends], [high for _, high in ends])

    note = (
        f"The ranker chooses the best of N candidates, {judge} judges it; the mean over all choices of N from one "
        "draw. Bands are 95 % intervals over prompts."
    )
    lines = [line("best of N", points), line("real pictures", [real] * len(sizes))]
    x_name = "N, candidates to choose from"
    return Plot(f"{title} against N", note, x_name, title, [float(size) for size in sizes], lines, log_x=True)
