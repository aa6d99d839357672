"""What a trained model must beat: honest baselines next to its own numbers.

Axes: b samples, n image tokens, k codebook_size, e features, c channels, H W pixels.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.splits import open_splits
from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.likelihood import other_captions, unigram_nats
from dalle_pytorch.evaluation.samples import distinct_pairs, read_samples
from dalle_pytorch.generation.generator import text_tokenizer_of
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.models.text_to_image import TextToImage

BATCH = 64  # samples evaluated together; no number depends on it


class Comparison(NamedTuple):
    """A model's number beside its baseline's."""

    name: str
    value: float
    baseline_name: str
    baseline: float
    higher_is_better: bool
    unit: str
    samples: int

    @property
    def beaten(self) -> bool:
        """Whether the model is strictly better than the baseline."""
        return self.value > self.baseline if self.higher_is_better else self.value < self.baseline


def psnr(images: Float[Tensor, "b c H W"], targets: Float[Tensor, "b c H W"]) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], of the mean squared error over all of them.

    (The mean of each picture's own ratio is higher: easy pictures weigh more there.) 120 dB = equal.
    """
    return -10 * (images - targets).square().mean().clamp_min(1e-12).log10().item()


@torch.no_grad()
def tokenizer_comparison(
    vae: ImageTokenizer, images: Float[Tensor, "b c H W"], mean_picture: Float[Tensor, "c H W"]
) -> Comparison:
    """PSNR of reconstructions through the hard codes, against that of the training set's mean picture."""
    reconstructions = torch.cat([vae.decode(vae.encode(part)) for part in images.split(BATCH)])
    return Comparison(
        "VAE reconstruction",
        psnr(reconstructions, images),
        "mean picture",
        psnr(mean_picture.expand_as(images), images),
        True,
        "dB PSNR",
        len(images),
    )


def unigram_loss(train_tokens: Int[Tensor, "train n"], tokens: Int[Tensor, "b n"], codebook_size: int) -> float:
    """Cross entropy of tokens under their frequencies in training (each counted once more), nats per token."""
    return unigram_nats(train_tokens, tokens, codebook_size).sum().item() / tokens.numel()


@torch.no_grad()
def image_loss(dalle: TextToImage, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]) -> float:
    """Mean image loss of a model in evaluation mode, nats per token."""
    total = 0.0
    for text, image in zip(text_tokens.split(BATCH), image_tokens.split(BATCH), strict=True):
        total += dalle.loss(text, image).image.item() * len(text)
    return total / len(text_tokens)


def dalle_comparisons(
    dalle: TextToImage,
    text_tokens: Int[Tensor, "b t"],
    image_tokens: Int[Tensor, "b n"],
    train_tokens: Int[Tensor, "train n"],
) -> list[Comparison]:
    """Image loss against the unigram model, and against the same model reading another sample's caption."""
    loss = image_loss(dalle, text_tokens, image_tokens)
    shuffled = image_loss(dalle, other_captions(text_tokens), image_tokens)
    unigram = unigram_loss(train_tokens, image_tokens, dalle.codebook_size)
    count = len(text_tokens)
    return [
        Comparison("DALLE image loss", loss, "unigram", unigram, False, "nats/token", count),
        Comparison("DALLE image loss", loss, "captions shuffled", shuffled, False, "nats/token", count),
    ]


@torch.no_grad()
def clip_comparisons(clip: CLIP, text_tokens: Int[Tensor, "b t"], images: Float[Tensor, "b c H W"]) -> list[Comparison]:
    """Recall at 1 in both directions among all given pairs, against chance. Captions should differ from each other."""
    text = torch.cat([clip.encode_text(part) for part in text_tokens.split(BATCH)])
    image = torch.cat([clip.encode_image(part) for part in images.split(BATCH)])
    scores, target = text @ image.T, torch.arange(len(text), device=text.device)
    to_image = (scores.argmax(dim=1) == target).float().mean().item()
    to_text = (scores.argmax(dim=0) == target).float().mean().item()
    count = len(text)
    return [
        Comparison("CLIP R@1 text to picture", 100 * to_image, "chance", 100 / count, True, "%", count),
        Comparison("CLIP R@1 picture to text", 100 * to_text, "chance", 100 / count, True, "%", count),
    ]


def ranking_comparison(ranking: dict) -> Comparison:
    """CLIP score of the kept against all candidates, from ``ranking.json``.

    The judge is the ranker itself, so this says that ranking works, not that the pictures are good.

    Raises:
        UserError: the candidates were not ranked.
    """
    kept, every = [], []
    for prompt in ranking["prompts"]:
        if prompt["all_scores"] is None:
            raise UserError("ranking.json has no scores: the candidates were drawn without a clip")
        kept += [row["score"] for row in prompt["kept"]]
        every += prompt["all_scores"]
    return Comparison(
        "CLIP score, kept", sum(kept) / len(kept), "all candidates", sum(every) / len(every), True, "cosine", len(kept)
    )


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as aligned text, one a line."""
    rows = [("measure", "model", "baseline", "", "unit", "samples", "")]
    for c in comparisons:
        verdict = "beaten" if c.beaten else "NOT BEATEN"
        rows.append((c.name, f"{c.value:.3f}", f"{c.baseline:.3f}", c.baseline_name, c.unit, str(c.samples), verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


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
    """All comparisons, stage by stage.

    Raises:
        FileNotFoundError: no ``ranking.json``.
    """
    if not Path(config.ranking).is_file():
        raise FileNotFoundError(f"ranking={config.ranking} does not exist; generate.py writes it")
    dalle, clip = load(config.dalle, kind="dalle"), load(config.clip, kind="clip")
    train_shards, val_shards = open_splits(config.data)
    train_images = read_samples(train_shards, config.data, dalle.vae.image_size).images
    images, captions, _ = read_samples(val_shards, config.data, dalle.vae.image_size)
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
