"""Draws pictures of a DALLE, ranks them with one CLIP and judges them with another.

Axes: p prompts, m candidates of a prompt, c channels, H W pixels, e features.
"""

import concurrent.futures
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.evaluation.dalle import draw, judged
from dalle_pytorch.evaluation.distribution import cmmd
from dalle_pytorch.evaluation.features import clip_extractor
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.samples import distinct_pairs
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.models.dalle import DALLE
from replication import dalles
from replication.arms import Curve, Job, Result, settings_of, threads_of, train
from replication.pictures import EMOJI, read

RANKER = ("experiment=replicate", "trainer.max_steps=1000")
JUDGE = (*RANKER, "model.patch_size=4", "model.dim_image=96", "model.dim_text=96", "data.jitter=3")
"""Another network than the ranker, and with another seed: their mistakes should have little in common."""
WRITER = ("experiment=replicate", "trainer.max_steps=1500", "model.caption_dropout=0.1", "model.dim=192")
CURVES = ("clip_score", "r_precision")
"""Numbers that are given for the best of every N."""
KNEE = 32
"""Candidates after which more of them bring little, as the paper has it."""
JUDGE_SEED = 1000
"""Added to the seed of the experiment."""


@dataclass
class DrawnConfig:
    """Settings of an arm."""

    split: str = "train"
    """Whose captions are drawn: "train" for known ones, "test_compose", "test_concept"."""
    caption: int = 0
    """Which of a picture's captions: 0 is its name, 1 its name and style."""
    num_prompts: int = 64
    """Different captions."""
    num_candidates: int = 32
    """Of each."""
    best_of: int = 1
    """How many candidates the ranker chooses from for the headline numbers."""
    cfg_scale: float = 1.0
    """Guidance; 1 = none."""
    temperature: float = 1.0
    """Of sampling."""


class Models(NamedTuple):
    """What draws, what chooses, what judges."""

    dalle: DALLE
    ranker: CLIP
    judge: CLIP


def prepare(shared: Path, seeds: Sequence[int], jobs: int) -> None:
    """Image tokenizer, tokens, and the three networks of every seed, ``jobs`` at a time; all experiments share them."""
    dalles.prepare(shared, seeds, jobs)
    threads = threads_of(jobs)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        trainings = [pool.submit(train, *each, threads) for seed in seeds for each in recipes_of(shared, seed)]
        for training in trainings:
            training.result()


def recipes_of(shared: Path, seed: int) -> list[tuple[str, list[str], int, Path]]:
    """Kind, settings, seed and folder of the DALLE, the ranker and the judge."""
    folder = shared / f"seed_{seed}"
    data = [f"vae={shared / 'vae' / 'vae.safetensors'}", f"data.path={shared / 'tokens'}"]
    return [
        ("dalle", [*WRITER, *data], seed, folder / "dalle"),
        ("clip", list(RANKER), seed, folder / "ranker"),
        ("clip", list(JUDGE), seed + JUDGE_SEED, folder / "judge"),
    ]


def models(job: Job) -> Models:
    """The three networks of a seed."""
    return Models(
        *(checkpoint.load(folder / f"{kind}.safetensors") for kind, _, _, folder in recipes_of(job.shared, job.seed))
    )


def run(job: Job) -> Result:
    """The judge's numbers as of ``evaluate.py``, the plain ones of the best of ``best_of``; curves over N."""
    config = settings_of(DrawnConfig, job.settings)
    dalle, ranker, judge = models(job)
    known = read(EMOJI, config.split, dalle.vae.image_size, caption=config.caption)
    own = known.take(distinct_pairs(known.captions, len(known.captions), job.seed))
    prompts = own.captions[: config.num_prompts]
    sampling = SamplingConfig(cfg_scale=config.cfg_scale, temperature=config.temperature)
    drawn = draw(dalle, prompts, num_candidates=config.num_candidates, seed=job.seed, sampling=sampling, ranker=ranker)
    assert drawn.ranks is not None
    measure = Measure({}, seed=job.seed, rounds=dalles.LEAST_ROUNDS)
    found = judged(drawn, own.images[: len(prompts)], measure, judge, own.captions, {}).metrics
    numbers = {name: metric.value for name, metric in found.items()}
    sizes = [2**power for power in range(config.num_candidates.bit_length()) if 2**power <= config.num_candidates]
    curves = {name: Curve(sizes, [numbers[f"{name}_best_of_{size}"] for size in sizes]) for name in CURVES}
    numbers |= {name: numbers[f"{name}_best_of_{config.best_of}"] for name in CURVES} | gains(numbers, sizes)
    eyes = clip_extractor(judge)
    features = eyes(drawn.images.flatten(0, 1)).unflatten(0, drawn.ranks.shape)
    numbers["cmmd"] = cmmd(eyes(known.images), best(features, drawn.ranks, config.best_of))
    return Result(numbers, curves)


def gains(numbers: Mapping[str, float], sizes: Sequence[int]) -> dict[str, float]:
    """What the judge's score gains up to KNEE candidates, and from there to all; nothing where there are fewer."""
    if sizes[-1] <= KNEE:
        return {}
    scores = [numbers[f"clip_score_best_of_{size}"] for size in (1, KNEE, sizes[-1])]
    return {"first_gain": scores[1] - scores[0], "later_gain": scores[2] - scores[1]}


def best(features: Float[Tensor, "p m e"], ranks: Float[Tensor, "p m"], best_of: int) -> Float[Tensor, "chosen e"]:
    """Features of the pictures that the ranker chooses, one of every ``best_of`` candidates in a row."""
    groups = ranks.unfold(1, best_of, best_of).argmax(dim=2) + torch.arange(0, ranks.shape[1] - best_of + 1, best_of)
    return torch.cat([row[chosen] for row, chosen in zip(features, groups, strict=True)])
