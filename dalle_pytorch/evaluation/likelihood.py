"""How likely a DALLE finds captions and pictures, sample by sample, beside models that know nothing.

Axes: b samples, t text tokens, n image tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.evaluation.shares import in_parts
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.text_to_image import TextToImage

TOGETHER = 64
"""Samples in one pass of the model; no number depends on it."""


class Likelihoods(NamedTuple):
    """Negative log-likelihoods in nats."""

    image: Float[Tensor, " b"]
    """Of each picture's tokens given the caption."""
    text: Float[Tensor, " b"] | None
    """Of each caption's tokens and the pad that ends it; None where the model predicts no text."""
    text_tokens: Float[Tensor, " b"] | None
    """How many text tokens these are."""


def likelihoods(dalle: TextToImage, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]) -> Likelihoods:
    """Of every sample, the same as ``dalle.loss`` takes the mean of. (A DALLEBart's are among the codes alone.)

    Args:
        dalle: the model.
        text_tokens: captions, 0 = padding.
        image_tokens: all tokens of their pictures.
    """
    device = next(dalle.parameters()).device

    def of_part(part: tuple[Tensor, Tensor]) -> Likelihoods:
        words, codes = (tokens.to(device) for tokens in part)
        image = dalle.image_nll(words, codes).sum(dim=1).cpu()
        if not dalle.has_text_head:
            return Likelihoods(image, None, None)
        nats, counted = dalle.text_nll(words)
        return Likelihoods(image, nats.sum(dim=1).cpu(), counted.sum(dim=1).float().cpu())

    pairs = list(zip(text_tokens.split(TOGETHER), image_tokens.split(TOGETHER), strict=True))
    with eval_mode(dalle):
        parts = in_parts(of_part, pairs)
    image, *text = ([part for part in column if part is not None] for column in zip(*parts, strict=True))
    return Likelihoods(torch.cat(image), *(torch.cat(column) if column else None for column in text))


def other_captions(text_tokens: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Of every sample another one's caption, not its own unless more than half of all share it.

    Samples of one caption stand together, in order of first occurrence; a shift by half the set leaves every group.
    """
    _, group = text_tokens.unique(dim=0, return_inverse=True)
    first = torch.full((len(group),), len(group)).scatter_reduce(0, group, torch.arange(len(group)), "amin")
    order = first[group].argsort(stable=True)
    others = torch.empty_like(text_tokens)
    others[order] = text_tokens[order.roll(len(order) // 2)]
    return others


def unigram_nats(
    train_tokens: Int[Tensor, "train n"], tokens: Int[Tensor, "b n"], codebook_size: int
) -> Float[Tensor, " b"]:
    """Nats of each picture's tokens under their frequencies in training, each counted once more."""
    counts = torch.bincount(train_tokens.flatten(), minlength=codebook_size).double() + 1
    return -(counts / counts.sum()).log()[tokens].sum(dim=1)


def unigram_text_nats(
    train: Sequence[Sequence[int]], captions: Sequence[Sequence[int]], vocab_size: int, text_len: int
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Nats and number of each caption's tokens under their frequencies in training, each counted once more.

    The end of a caption shorter than ``text_len`` counts as a token, as it does for the DALLE; id 0 stands for it.

    Args:
        train: text ids of training captions, without padding.
        captions: text ids of those that are judged.
        vocab_size: text ids, padding included.
        text_len: longest caption.
    """

    def ended(ids: Sequence[int]) -> list[int]:
        return [*ids, 0][:text_len]

    counts = torch.bincount(torch.tensor([i for ids in train for i in ended(ids)]), minlength=vocab_size).double() + 1
    nats = -(counts / counts.sum()).log()
    sums = torch.stack([nats[ended(ids)].sum() for ids in captions])
    return sums, torch.tensor([len(ended(ids)) for ids in captions], dtype=torch.float64)
