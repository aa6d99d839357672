"""How well a DALLE completes held-out pictures of which some image tokens are given: the top rows, or all but a hole.

Axes: b pictures, m completions of a picture, n image tokens, c channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.checkpoints.checkpoint import weights_sha256
from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.features import Extractor, caption_features, clip_extractor, lpips_each
from dalle_pytorch.evaluation.measure import Evaluation, Measure
from dalle_pytorch.evaluation.page import Gallery, Table
from dalle_pytorch.evaluation.part import Part
from dalle_pytorch.evaluation.reconstruction import l1_each, psnr_each
from dalle_pytorch.evaluation.report import Metrics, Protocol, shown
from dalle_pytorch.evaluation.retrieval import DISTRACTORS, clip_score, r_precision
from dalle_pytorch.evaluation.shares import in_parts
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.grid import GridRow
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import KnownTokens
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.models.two_towers import TwoTowers

SHOWN = 6
"""Pictures on the page for every part that is drawn, a row each."""
SHOWN_DRAWN = 2
"""Completions of each, and of each with another's caption."""
DRAWN = ("own", "other_caption")
"""Ways that the model draws."""
WAYS = {
    "own": "the model",
    "other_caption": "the model, another's caption",
    "copied": "another picture's tokens",
    "reconstructed": "the picture's own tokens",
}
"""What fills the part: the model, two baselines, and the most that the image tokenizer allows."""


@dataclass(kw_only=True)
class CompletionConfig:
    """Which parts of held-out pictures a DALLE draws, given the rest; nothing given = none."""

    rows: list[float] = field(default_factory=list)
    """The top is given, so much of the height each; in (0, 1)."""
    hole: list[float] = field(default_factory=list)
    """All but the middle square is given, whose side is so much of the picture's; in (0, 1). In raster order
    what is given below it is not seen; with sampling.strategy=random all is."""
    num_pictures: int = 16
    """Pictures to complete, with captions that all differ."""
    num_candidates: int = 2
    """Completions of each with its own caption, and as many with another's."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        for name in ("rows", "hole"):
            shares = getattr(self, name)
            if any(not 0 < share < 1 for share in shares) or len(set(shares)) < len(shares):
                raise UserError(f"complete.{name} must hold different shares in (0, 1), got {shares}")
        if self.num_pictures < 2:
            raise UserError(f"complete.num_pictures must be at least 2, got {self.num_pictures}")
        if self.num_candidates < 1:
            raise UserError(f"complete.num_candidates must be at least 1, got {self.num_candidates}")

    def parts(self, grid: int, margin: tuple[int, int] = (0, 0)) -> dict[str, Part]:
        """The parts to draw by name, "rows_0.25", of a grid of tokens with a margin.

        Raises:
            ValueError: a part has no token, or leaves none; names it.
        """
        found = {}
        for share in self.rows:
            given = round(share * grid)
            if not 0 < given < grid:
                raise UserError(
                    f"complete.rows={share:g} gives {given} of {grid} token rows: 1 to {grid - 1} can be given"
                )
            found[f"rows_{share:g}"] = Part(grid, given, grid, 0, grid, margin)
        for share in self.hole:
            side = round(share * grid)
            if not 0 < side < grid:
                raise UserError(
                    f"complete.hole={share:g} is {side} of {grid} tokens wide: it must hold one, and leave some"
                )
            first = (grid - side) // 2
            found[f"hole_{share:g}"] = Part(grid, first, first + side, first, first + side, margin)
        return found


class Completed(NamedTuple):
    """A part of some pictures, filled in the ways of ``WAYS``."""

    image_tokens: dict[str, Int[Tensor, "b m n"]]
    images: dict[str, Float[Tensor, "b m c H W"]]
    """In [0, 1]."""


def complete(
    generator: Generator,
    captions: Sequence[str],
    image_tokens: Int[Tensor, "b n"],
    part: Part,
    *,
    num_candidates: int,
    seed: int,
    sampling: SamplingConfig,
    progress: Callable[[int], object] = lambda drawn: None,
) -> Completed:
    """Fill the part of each picture; the other tokens stay as they are.

    The pictures give each other captions and tokens: each takes those of the one that lies half the set away.

    Args:
        generator: of the model.
        captions: of the pictures, two at least.
        image_tokens: of the pictures.
        part: what is drawn.
        num_candidates: completions with its own caption, and with another's.
        seed: of both.
        sampling: how they are drawn.
        progress: called with the number of image tokens that have just been drawn, or were given before them.

    Raises:
        ValueError: fewer than two pictures.
    """
    if len(captions) < 2:
        raise UserError(f"{len(captions)} pictures given: the baselines of completion need at least two")
    keep, own = part.keep(), image_tokens
    shift = len(own) // 2
    others = [*captions[shift:], *captions[:shift]]

    def drawn_for(prompts: Sequence[str]) -> Int[Tensor, "b m n"]:
        def fill(place: int) -> Tensor:
            return generator.candidates(
                prompts[place], range(num_candidates), seed=seed, sampling=sampling, truncate=True, progress=progress,
                given=KnownTokens(own[place : place + 1], keep),
            ).image_tokens  # fmt: skip

        return torch.stack(in_parts(fill, range(len(prompts))))

    tokens = {
        "own": drawn_for(captions),
        "other_caption": drawn_for(others),
        "copied": torch.where(keep, own, own.roll(-shift, dims=0))[:, None],
        "reconstructed": own[:, None],
    }
    images = {
        way: generator.decode(rows.flatten(0, 1)).clamp(0, 1).unflatten(0, rows.shape[:2])
        for way, rows in tokens.items()
    }
    return Completed(tokens, images)


class Eyes(NamedTuple):
    """What completed parts are looked at with."""

    measure: Measure
    judge: TwoTowers | None
    """A CLIP: CLIP score and R-precision of the part alone, on white."""
    lpips: LPIPS | None
    """For lpips_vgg of the part."""
    captions: Sequence[str]
    """All different captions of the split."""


def evaluate_completion(
    completed: Completed,
    originals: Float[Tensor, "b c H W"],
    part: Part,
    name: str,
    prompts: Sequence[str],
    eyes: Eyes,
    how: Protocol,
) -> Evaluation:
    """The drawn part beside that of the original, in every way of filling it.

    Args:
        completed: what ``complete`` gave.
        originals: the pictures.
        part: what was drawn.
        name: of the part, in the names of the numbers.
        prompts: caption of each picture, among those of ``eyes``.
        eyes: protocol and networks.
        how: how it was drawn.
    """
    found: dict[str, Metrics] = {}
    errors: dict[str, Tensor] = {}
    same = {"part": name, **{key: how[key] for key in ("seed",) if key in how}}  # the seed chose the pictures
    for way, images in completed.images.items():
        used = {**same, **(how if way in DRAWN else {})}
        errors[way], near = compared(images, originals, part, eyes, used)
        found[way] = near | judged(images, part, prompts, eyes, used)
    found["real"] = judged(originals[:, None], part, prompts, eyes, same)
    metrics = {
        f"complete_{name}_{key}{'' if way == 'own' else f'_{way}'}": metric
        for way, of in found.items()
        for key, metric in of.items()
    }
    gain = eyes.measure.mean(errors["other_caption"] - errors["own"], how={**same, **how})
    metrics[f"complete_{name}_l1_gain_of_caption"] = gain
    return Evaluation(metrics, [table(name, found), pictures(completed, originals, part, name, prompts)])


def compared(
    images: Float[Tensor, "b m c H W"], originals: Float[Tensor, "b c H W"], part: Part, eyes: Eyes, how: Protocol
) -> tuple[Float[Tensor, " b"], Metrics]:
    """L1 of each picture's part, and L1, PSNR and LPIPS of the parts: a mean over completions, then over pictures."""
    b, m = images.shape[:2]
    mine, targets = part.crop(images.flatten(0, 1)), part.crop(originals.repeat_interleave(m, dim=0))
    l1 = l1_each(mine, targets).view(b, m).mean(dim=1)
    psnr = psnr_each(mine, targets).view(b, m).mean(dim=1)
    found = {
        "l1": eyes.measure.mean(l1, better="lower", how=how),
        "psnr": eyes.measure.mean(psnr, unit="dB", how={**how, "of": "mean over pictures"}),
    }
    if (net := eyes.lpips) is not None and min(mine.shape[2:]) >= net.network.least_size:
        seen = Extractor("vgg16 with lpips heads 0.1", "the part, own size", weights_sha256(net), net, lambda x: x)
        each = lpips_each(net, mine, targets).view(b, m).mean(dim=1)
        found["lpips_vgg"] = eyes.measure.mean(each, better="lower", extractor=seen, how=how)
    return l1, found


def judged(
    images: Float[Tensor, "b m c H W"], part: Part, prompts: Sequence[str], eyes: Eyes, how: Protocol
) -> Metrics:
    """CLIP score of the part with its picture's caption, and whether it finds that caption; nothing without a judge."""
    if eyes.judge is None:
        return {}
    b, m = images.shape[:2]
    clip = clip_extractor(eyes.judge)
    extractor = replace(clip, protocol=f"the part alone, on white; {clip.protocol}")
    features, texts = extractor(part.alone(images.flatten(0, 1))), caption_features(eyes.judge, eyes.captions)
    place = torch.tensor([eyes.captions.index(prompt) for prompt in prompts]).repeat_interleave(m)
    scores = clip_score(features, texts[place]).view(b, m).mean(dim=1)
    found = {"clip_score": eyes.measure.mean(scores, extractor=extractor, how=how)}
    if (distractors := min(DISTRACTORS, len(eyes.captions) - 1)) > 0:
        hits = r_precision(features, texts, place, eyes.measure.generator(), distractors=distractors).view(b, m)
        among = {**how, "distractors": distractors}
        found["r_precision"] = eyes.measure.mean(hits.mean(dim=1), extractor=extractor, how=among)
    return found


def table(name: str, found: dict[str, Metrics]) -> Table:
    """A row a way of filling the part, and the original part where there is a judge."""
    head = list(found["own"])
    names = {**WAYS, "real": "the original part"}
    rows = [
        (names[way], *(shown(of[key].value) if key in of else "" for key in head)) for way, of in found.items() if of
    ]
    note = (
        "Of the drawn part alone. Between the tokens of another picture, which know nothing of this one, and its own "
        "tokens, which are the best that the image tokenizer can give back."
    )
    return Table(f"Completion, {name}", note, ("the part is filled with", *head), rows)


def pictures(
    completed: Completed, originals: Float[Tensor, "b c H W"], part: Part, name: str, prompts: Sequence[str]
) -> Gallery:
    """Original, what is given, completions and baselines, a row a picture."""
    given, rows = part.without(originals), []
    for i, prompt in enumerate(prompts[:SHOWN]):
        own, other = (completed.images[way][i, :SHOWN_DRAWN] for way in DRAWN)
        ends = [completed.images[way][i, 0] for way in ("copied", "reconstructed")]
        labels = [
            "original",
            "given",
            *["completed"] * len(own),
            *["other caption"] * len(other),
            "other picture",
            "own tokens",
        ]
        rows.append(GridRow(prompt, [originals[i], given[i], *own, *other, *ends], labels))
    note = (
        "The grey part is drawn. Completed with the picture's caption, with another picture's caption, with another "
        "picture's tokens; last, all of its own tokens."
    )
    return Gallery(f"Completion, {name}: pictures", note, rows)
