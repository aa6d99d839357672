"""Trains a DALLE on cached tokens and measures how likely it finds held-out captions and pictures."""

import re
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.evaluation.dalle import Pairs, evaluate_likelihood
from dalle_pytorch.evaluation.image_tokenizer import reconstruct
from dalle_pytorch.evaluation.likelihood import likelihoods
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.samples import Samples
from dalle_pytorch.generation.generator import text_tokenizer_of
from dalle_pytorch.models.dalle import DALLE
from replication.arms import Job, Result, command, threads_of, train
from replication.pictures import EMOJI, HELD_OUT, read

SPLITS = {"val": HELD_OUT, "concept": "test_concept"}
"""Where numbers come from: known things, and things that no training picture shows."""
NUMBERS = {
    "image": "image_nats",
    "shuffled": "image_nats_shuffled_captions",
    "unigram": "image_nats_unigram",
    "text": "text_nats",
}
"""Our names of the numbers of ``evaluate.py``."""
LEAST_ROUNDS = 2
"""Draws for intervals over samples, which nobody reads here: those over seeds count."""
CROPS = 2
"""Shifted copies of each training picture among the cached tokens."""


def prepare(shared: Path, seeds: Sequence[int], jobs: int) -> None:
    """One image tokenizer for all DALLEs of all seeds, and the tokens of all pictures; kept for other experiments."""
    threads = threads_of(1)
    weights = train("vae", ["experiment=replicate"], 0, shared / "vae", threads)
    if not (shared / "tokens" / "index.json").is_file():
        command(
            "prepare_data",
            ["source=shards", f"path={EMOJI}", f"vae={weights}", f"out={shared / 'tokens'}", "resize=true",
             f"crops={CROPS}", "jitter=2", "workers=1"],
            shared / "tokens.log", threads,
        )  # fmt: skip


def run(job: Job) -> Result:
    """Train with ``job.settings`` on top of ``experiment=replicate``; nats per token of held-out pairs."""
    dalle = checkpoint.load(trained(job), kind="dalle")
    known = pairs_of(dalle, read(EMOJI, "train", dalle.vae.image_size, most=1000))
    numbers: dict[str, float] = {}
    for name, split in SPLITS.items():
        held_out = pairs_of(dalle, read(EMOJI, split, dalle.vae.image_size))
        found = evaluate_likelihood(dalle, held_out, known, Measure({}, rounds=LEAST_ROUNDS)).metrics
        numbers |= {f"{short}_{name}": found[long].value for short, long in NUMBERS.items()}
        misspelt = text_of(dalle, [typos(caption) for caption in held_out.captions])
        nats = likelihoods(dalle, misspelt, held_out.image_tokens).image
        numbers[f"typos_{name}"] = nats.mean().item() / dalle.num_image_tokens
    return Result(numbers)


def trained(job: Job) -> str:
    """Weights of the job's DALLE, trained if they are not there; on the shared tokens unless its settings name data."""
    shared = [f"vae={job.shared / 'vae' / 'vae.safetensors'}"]
    if not any(setting.startswith("data=") for setting in job.settings):
        shared += [f"data.path={job.shared / 'tokens'}"]
    settings = ["experiment=replicate", *shared, *job.settings]
    return str(train("dalle", settings, job.seed, job.folder / "dalle", job.threads))


def pairs_of(dalle: DALLE, samples: Samples) -> Pairs:
    """Captioned pictures as tokens."""
    return Pairs(samples.captions, text_of(dalle, samples.captions), reconstruct(dalle.vae, samples.images)[0])


def text_of(dalle: DALLE, captions: Sequence[str]) -> Int[Tensor, "b t"]:
    """Captions as the model reads them."""
    return text_tokenizer_of(dalle, "dalle").tokenize(list(captions), dalle.config.text_len, truncate=True)


def typos(caption: str) -> str:
    """A caption with the second and third letter of every word of four letters or more swapped."""
    return re.sub(r"\b(\w)(\w)(\w)(?=\w)", r"\1\3\2", caption)
