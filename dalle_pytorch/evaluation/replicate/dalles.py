"""Trains a DALLE on cached tokens and measures how likely it finds held-out captions and pictures."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from dalle_pytorch import checkpoint
from dalle_pytorch.evaluation.image_tokenizer import reconstruct
from dalle_pytorch.evaluation.likelihood import likelihoods, unigram_nats
from dalle_pytorch.evaluation.replicate.arms import Job, Result, command, threads_of, train
from dalle_pytorch.evaluation.replicate.pictures import EMOJI, HELD_OUT, Captioned, read
from dalle_pytorch.models.dalle import DALLE

SPLITS = {"val": HELD_OUT, "concept": "test_concept"}
"""Where numbers come from: known things, and things that no training picture shows."""
CROPS = 2
"""Shifted copies of each training picture among the cached tokens."""


def prepare(shared: Path, seeds: Sequence[int], jobs: int) -> None:
    """One image tokenizer for all DALLEs of all seeds, and the tokens of all pictures; kept for other experiments."""
    threads = threads_of(1)
    weights = train("vae", ["experiment=replicate"], 0, shared / "vae", threads)
    if not (shared / "tokens" / "index.json").is_file():
        command(
            "prepare_data",
            ["encode=true", f"path={EMOJI}", f"vae={weights}", f"out={shared / 'tokens'}", "resize=true",
             f"crops={CROPS}", "jitter=2", "workers=1"],
            shared / "tokens.log", threads,
        )  # fmt: skip


def run(job: Job) -> Result:
    """Train with ``job.settings`` on top of ``experiment=replicate``; nats per token of held-out pairs."""
    dalle = checkpoint.load(trained(job), kind="dalle")
    known = reconstruct(dalle.vae, read(EMOJI, "train", dalle.vae.image_size, most=1000).images)[0]
    numbers: dict[str, float] = {}
    for name, split in SPLITS.items():
        pairs = read(EMOJI, split, dalle.vae.image_size)
        tokens = reconstruct(dalle.vae, pairs.images)[0]
        numbers |= {f"{key}_{name}": value for key, value in nats(dalle, pairs, tokens).items()}
        unigram = unigram_nats(known, tokens, dalle.codebook_size).mean() / tokens.shape[1]
        numbers[f"unigram_{name}"] = unigram.item()
    return Result(numbers)


def trained(job: Job) -> str:
    """Weights of the job's DALLE, trained if they are not there."""
    shared = [f"vae={job.shared / 'vae' / 'vae.safetensors'}", f"data.path={job.shared / 'tokens'}"]
    settings = ["experiment=replicate", *shared, *job.settings]
    return str(train("dalle", settings, job.seed, job.folder / "dalle", job.threads))


def nats(dalle: DALLE, pairs: Captioned, image_tokens: torch.Tensor) -> dict[str, float]:
    """Per image token, per text token, and per image token with captions of other pictures and with misspelt ones."""
    assert dalle.text_tokenizer is not None
    text = dalle.text_tokenizer.tokenize(pairs.captions, dalle.config.text_len, truncate=True)
    found = likelihoods(dalle, text, image_tokens)
    assert found.text is not None
    assert found.text_tokens is not None
    others = likelihoods(dalle, text.roll(len(text) // 2, dims=0), image_tokens)
    misspelt = dalle.text_tokenizer.tokenize([typos(c) for c in pairs.captions], dalle.config.text_len, truncate=True)
    count = image_tokens.shape[1]
    return {
        "image": found.image.mean().item() / count,
        "text": (found.text.sum() / found.text_tokens.sum()).item(),
        "shuffled": others.image.mean().item() / count,
        "typos": likelihoods(dalle, misspelt, image_tokens).image.mean().item() / count,
    }


def typos(caption: str) -> str:
    """A caption with the second and third letter of every word of four letters or more swapped."""
    return re.sub(r"\b(\w)(\w)(\w)(?=\w)", r"\1\3\2", caption)
