"""The other way round: captions that the DALLE finds likely, and how well a caption explains a picture.

The stream is caption first, picture second, so a picture's caption is found by drawing captions and asking how likely
each makes the picture (Bayes: p(caption | picture) ~ p(caption) p(picture | caption)).

Axes: b captions, t text_len, n image tokens, v text vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.sampling import SamplingConfig, candidate_uniforms
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.text_to_image import NO_TEXT_HEAD, TextToImage

TOGETHER = 64
"""Captions in one pass of the model."""


def image_log_likelihood(
    dalle: TextToImage, text_tokens: Int[Tensor, "b t"], image_tokens: Int[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Log-likelihood of each picture given its caption, in nats, summed over its image tokens.

    Differences between captions of one picture rank them; divide by n for nats per token.
    """
    pairs = zip(text_tokens.split(TOGETHER), image_tokens.split(TOGETHER), strict=True)
    with eval_mode(dalle):
        return -torch.cat([dalle.image_nll(text, image).sum(dim=1) for text, image in pairs])


def draw_texts(
    dalle: TextToImage, start_tokens: Int[Tensor, "b start"], uniforms: Float[Tensor, "b t"], sampling: SamplingConfig
) -> Int[Tensor, "b t"]:
    """Continue captions; 0 from where a caption ends. Every step reads the caption anew: captions are short.

    Args:
        dalle: the model.
        start_tokens: how the captions begin, without padding; may be empty.
        uniforms: a number in [0, 1) for every caption and position.
        sampling: temperature and truncation, over the text vocabulary; guidance has no meaning here.

    Raises:
        ValueError: the model has no text head, guidance is asked for, the start fills the context, or it is empty and
            the model has no <bos>.
    """
    if not dalle.has_text_head:
        raise UserError(NO_TEXT_HEAD)
    config = dalle.config
    if sampling.guided():
        raise UserError("guidance (cfg_scale, cfg_schedule) weighs captions against none: it cannot draw captions")
    if start_tokens.shape[1] >= config.text_len:
        raise UserError(
            f"{start_tokens.shape[1]} text tokens to continue, the model reads text_len = {config.text_len}"
        )
    if start_tokens.numel() and not 0 < int(start_tokens.min()) <= int(start_tokens.max()) < config.text_vocab_size:
        raise UserError(f"the start must hold text tokens 1 to {config.text_vocab_size - 1}, without padding")
    tokens = F.pad(start_tokens, (0, config.text_len - start_tokens.shape[1]))
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    with eval_mode(dalle):
        for position in range(start_tokens.shape[1], config.text_len):
            drawn = sampling.pick(dalle.next_text_scores(tokens[:, :position]), uniforms[:, position])
            tokens[:, position] = torch.where(ended, 0, drawn)
            ended |= drawn == 0
            if ended.all():
                break
    return tokens


class Captions(NamedTuple):
    """Captions of a picture, likeliest first."""

    texts: list[str]
    text_tokens: Int[Tensor, "b t"]
    log_likelihoods: Float[Tensor, " b"]
    """Of the picture given the caption, in nats."""


def caption_picture(
    dalle: TextToImage,
    image: Float[Tensor, "c H W"],
    *,
    prompt: str = "",
    num_candidates: int = 64,
    num_keep: int = 8,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
) -> Captions:
    """Captions of a picture: draw some, keep those that make the picture likeliest.

    Args:
        dalle: a model with a text tokenizer.
        image: RGB in [0, 1], of the model's size.
        prompt: how every caption begins.
        num_candidates: captions drawn; equal ones count once.
        num_keep: captions returned at most.
        seed: caption i is a function of (prompt, seed, i).
        sampling: how captions are drawn.

    Raises:
        ValueError: counts out of range, or a model without a text tokenizer or a text head.
    """
    if not 1 <= num_keep <= num_candidates:
        raise UserError(f"num_keep ({num_keep}) must lie in 1 to num_candidates ({num_candidates})")
    tokenizer = dalle.text_tokenizer
    if tokenizer is None:
        raise UserError("this dalle carries no text tokenizer, so it cannot write captions; set dalle.text_tokenizer")
    device = next(dalle.parameters()).device
    start = torch.tensor([tokenizer.encode(prompt)] * num_candidates, dtype=torch.long, device=device)
    start = start.reshape(num_candidates, -1)
    uniforms = [candidate_uniforms(prompt, seed, index, dalle.config.text_len) for index in range(num_candidates)]
    drawn = draw_texts(dalle, start, torch.stack(uniforms).to(device), sampling or SamplingConfig()).unique(dim=0)
    with torch.no_grad():
        tokens = dalle.vae.encode(image[None].to(device)).expand(len(drawn), -1)
    likelihoods = image_log_likelihood(dalle, drawn, tokens)
    best = likelihoods.argsort(descending=True)[:num_keep]
    texts = [tokenizer.decode([token for token in row if token]) for row in drawn[best].tolist()]
    return Captions(texts, drawn[best].cpu(), likelihoods[best].cpu())
