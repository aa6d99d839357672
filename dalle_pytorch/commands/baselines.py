"""Set a run's three models beside their honest baselines: ``baselines.py vae=... dalle=... clip=... ranking=...``."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.config import entry
from dalle_pytorch.data.datamodule import DataConfig, all_pictures, open_splits
from dalle_pytorch.evaluation.baselines import (
    Comparison,
    clip_comparisons,
    dalle_comparisons,
    ranking_comparison,
    table,
    tokenizer_comparison,
)
from dalle_pytorch.evaluation.samples import distinct_pairs
from dalle_pytorch.generation.generator import text_tokenizer_of


@dataclass(kw_only=True)
class BaselinesConfig:
    """The models and the pictures to judge them on."""

    dalle: str = "???"
    """Checkpoint of a DALLE; its VAE is judged too."""
    clip: str = "???"
    """Checkpoint of a CLIP."""
    ranking: str = "???"
    """``ranking.json`` of generate.py."""
    data: DataConfig = field(default_factory=DataConfig)
    """The validation split is judged, the training split gives mean picture and token frequencies."""
    max_pairs: int = 256
    """Pairs for the CLIP's recall; each with another caption."""
    seed: int = 0
    """Of the choice of those pairs."""


@torch.no_grad()
def compare(config: BaselinesConfig) -> list[Comparison]:
    """All comparisons, stage by stage."""
    dalle, clip = load(config.dalle, kind="dalle"), load(config.clip, kind="clip")
    train_shards, val_shards = open_splits(config.data)
    train_images, _ = all_pictures(train_shards, config.data, dalle.vae.image_size)
    images, captions = all_pictures(val_shards, config.data, dalle.vae.image_size)
    train_tokens = torch.cat([dalle.vae.encode(part) for part in train_images.split(256)])
    text = text_tokenizer_of(dalle, "dalle").tokenize(captions, dalle.config.text_len, truncate=True)
    pairs = distinct_pairs(captions, config.max_pairs, config.seed)
    clip_text = text_tokenizer_of(clip, "clip").tokenize(
        [captions[i] for i in pairs], clip.config.text_len, truncate=True
    )
    return [
        tokenizer_comparison(dalle.vae, images, train_images.mean(dim=0)),
        *dalle_comparisons(dalle, text, dalle.vae.encode(images), train_tokens),
        *clip_comparisons(clip, clip_text, images[pairs]),
        ranking_comparison(json.loads(Path(config.ranking).read_text(encoding="utf-8"))),
    ]


@entry("baselines", BaselinesConfig)
def main(config: BaselinesConfig) -> None:
    """Print the table; exit with 1 where a baseline is not beaten."""
    if not Path(config.ranking).is_file():
        raise FileNotFoundError(f"ranking={config.ranking} does not exist; generate.py writes it")
    comparisons = compare(config)
    print(f"on the split {config.data.val_split!r} of {config.data.path}")
    print(table(comparisons))
    if not all(comparison.beaten for comparison in comparisons):
        sys.exit("a baseline is not beaten")


if __name__ == "__main__":
    main()
