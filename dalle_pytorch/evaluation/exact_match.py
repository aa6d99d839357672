"""How often greedy decoding writes every image token of a captioned picture as its tokenizer does.

Axes: b samples, n image tokens, t text tokens.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.splits import open_splits
from dalle_pytorch.evaluation.baselines import psnr
from dalle_pytorch.evaluation.samples import read_samples
from dalle_pytorch.generation.decoder import Decoder
from dalle_pytorch.generation.generator import text_tokenizer_of
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import generate_image_tokens
from dalle_pytorch.models.text_to_image import TextToImage

BATCH = 256  # captions decoded together; no number depends on it


@torch.no_grad()
def greedy_matches(
    dalle: TextToImage, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]
) -> Bool[Tensor, "b n"]:
    """Which tokens greedy decoding of the captions gets right.

    The rainbow notebook of DALLE-pytorch (examples/rainbow_dalle.ipynb) counts the rows that are right throughout.

    Args:
        dalle: the model.
        text_tokens: captions, 0 = padding.
        image_tokens: what the tokenizer writes for their pictures.
    """
    decoder, greedy, rows = Decoder(dalle), SamplingConfig(temperature=0.0), []
    for text in text_tokens.split(BATCH):
        unused = torch.zeros(len(text), dalle.num_image_tokens)
        rows.append(generate_image_tokens(decoder, text, unused, greedy))
    return torch.cat(rows) == image_tokens


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
        images, captions, _ = read_samples(shards, config.data, dalle.vae.image_size)
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
