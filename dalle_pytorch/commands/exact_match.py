"""Exact match of greedy decoding, split by split: ``python -m dalle_pytorch.commands.exact_match dalle=... data=rainbow``."""

from dataclasses import dataclass, field

import torch

from dalle_pytorch.checkpoint import load
from dalle_pytorch.config import entry
from dalle_pytorch.data.datamodule import DataConfig, Pictures, open_splits
from dalle_pytorch.evaluation.baselines import psnr
from dalle_pytorch.evaluation.exact_match import exact_match
from dalle_pytorch.generation.generator import text_tokenizer_of


@dataclass(kw_only=True)
class ExactMatchConfig:
    """The model and the pictures."""

    dalle: str = "???"
    """Checkpoint of a DALLE."""
    data: DataConfig = field(default_factory=DataConfig)
    """Both of its splits are judged."""


@torch.no_grad()
def judge(config: ExactMatchConfig) -> list[str]:
    """A line for each split: exact match, share of right tokens, PSNR of the VAE."""
    dalle = load(config.dalle, kind="dalle")
    tokenizer, lines = text_tokenizer_of(dalle, "dalle"), []
    for shards in open_splits(config.data):
        pictures = Pictures(shards, config.data, image_size=dalle.vae.image_size, train=False)
        images = torch.stack([pictures[i]["image"] for i in range(len(pictures))])
        captions = [pictures[i]["caption"] for i in range(len(pictures))]
        text = tokenizer.tokenize(captions, dalle.config.text_len)
        image_tokens = torch.cat([dalle.vae.encode(part) for part in images.split(256)])
        decoded = torch.cat([dalle.vae.decode(part) for part in image_tokens.split(256)])
        whole, single = exact_match(dalle, text, image_tokens)
        lines.append(
            f"{shards.split}: {len(captions)} captions, all tokens right {whole:.4f}, tokens right {single:.4f}, "
            f"VAE {psnr(decoded, images):.2f} dB PSNR (mean over pictures)"
        )
    return lines


@entry("exact_match", ExactMatchConfig)
def main(config: ExactMatchConfig) -> None:
    """Print the lines."""
    print("\n".join(judge(config)))


if __name__ == "__main__":
    main()
