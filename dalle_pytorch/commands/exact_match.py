"""Exact match of greedy decoding: ``python -m dalle_pytorch.commands.exact_match dalle=... data=rainbow``."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.config import entry
from dalle_pytorch.data.datamodule import DataConfig, all_pictures, open_splits
from dalle_pytorch.evaluation.baselines import psnr
from dalle_pytorch.evaluation.exact_match import greedy_matches
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
    """A line for each split: exact match, share of right tokens, PSNR of the VAE.

    Of the validation split also the pictures that are not, pixel for pixel, in the training split: a circle turned is
    the same picture under another caption.
    """
    dalle = load(config.dalle, kind="dalle")
    tokenizer, lines, seen = text_tokenizer_of(dalle, "dalle"), [], set()
    for shards in open_splits(config.data):
        images, captions = all_pictures(shards, config.data, dalle.vae.image_size)
        text = tokenizer.tokenize(captions, dalle.config.text_len)
        image_tokens = torch.cat([dalle.vae.encode(part) for part in images.split(256)])
        decoded = torch.cat([dalle.vae.decode(part) for part in image_tokens.split(256)])
        right = greedy_matches(dalle, text, image_tokens)
        pixels = [image.numpy().tobytes() for image in images]
        new = torch.tensor([p not in seen for p in pixels])
        seen = seen or set(pixels)
        lines.append(
            f"{shards.split}: {len(captions)} captions, all tokens right {share(right.all(dim=1)):.4f} "
            f"({share(right.all(dim=1)[new]):.4f} of the {int(new.sum())} whose picture is in no earlier split), "
            f"tokens right {share(right):.4f}, VAE {psnr(decoded, images):.2f} dB PSNR"
        )
    return lines


def share(right: Tensor) -> float:
    """Part of a boolean tensor that is true; 0 of none."""
    return right.float().mean().nan_to_num().item()


@entry("exact_match", ExactMatchConfig)
def main(config: ExactMatchConfig) -> None:
    """Print the lines."""
    print("\n".join(judge(config)))


if __name__ == "__main__":
    main()
