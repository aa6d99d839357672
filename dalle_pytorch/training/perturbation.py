"""Decoder post-training: images are decoded from tokens that are not quite theirs, as those that a DALLE draws.

Encoder and codes rest, so that token shards and DALLEs stay valid; the decoder learns to make good images of imperfect
tokens.

Source: Qiu et al. 2025, https://arxiv.org/abs/2509.12474, section 3.3, for tokens that the model itself predicts;
neighbours as in Li et al. 2024 (ImageFolder), https://arxiv.org/abs/2410.01756.

Axes: b batch, n image tokens, k codebook_size.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.checkpoints.checkpoint import describe_tokenizer, token_differences
from dalle_pytorch.checkpoints.loading import load
from dalle_pytorch.errors import UserError, at_least_one, finite
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.image_tokenizer import TrainableTokenizer
from dalle_pytorch.models.text_to_image import TextToImage
from dalle_pytorch.training.frozen import Frozen

ROWS = 1024
"""Rows of a matrix of distances computed at once."""


@dataclass(kw_only=True)
class PerturbationConfig:
    """Tokens that the decoder learns from."""

    share: float = 0.0
    """Part of an image's tokens that are replaced, in [0, 1]; 0 = off: encoder, codes and decoder learn together."""
    dalle: str | None = None
    """A DALLE with this image tokenizer: a replaced token is what it draws there, given the caption and the image's own
    tokens before; null = one of its nearest codes."""
    neighbours: int = 16
    """How many nearest codes there are to choose from, without a DALLE."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: a field is out of range; names it.
        """
        finite(self)
        at_least_one(self, "neighbours")
        if not 0 <= self.share <= 1:
            raise UserError(f"share must lie in [0, 1], got {self.share}")
        if self.dalle is not None and not self.share:
            raise UserError(f"dalle={self.dalle} replaces no token while share is 0: set it, as share=0.5")


class Perturbation(nn.Module):
    """Replaces image tokens.

    Args:
        config: how many, and by what.
        vae: knows its codes.
        dalle: where ``config.dalle`` names one.
    """

    nearest: Tensor

    def __init__(self, config: PerturbationConfig, vae: TrainableTokenizer, dalle: TextToImage | None = None) -> None:
        super().__init__()
        self.share, self.dalle = config.share, None if dalle is None else Frozen(dalle)
        if dalle is None:
            if config.neighbours >= vae.codebook_size:
                raise UserError(
                    f"perturbation.neighbours ({config.neighbours}) must be below the {vae.codebook_size} codes"
                )
            self.register_buffer("nearest", nearest_codes(vae.code_vectors(), config.neighbours), persistent=False)

    @torch.no_grad()
    def forward(
        self, image_tokens: Int[Tensor, "b n"], captions: list[str], generator: torch.Generator
    ) -> Int[Tensor, "b n"]:
        """Tokens of which some are others.

        Args:
            image_tokens: of images.
            captions: theirs; read by a DALLE alone.
            generator: of the CPU, so that every device draws the same.
        """
        device, shape = image_tokens.device, image_tokens.shape
        chosen = torch.rand(shape, generator=generator).to(device) < self.share
        uniforms = torch.rand(shape, generator=generator).to(device)
        if self.dalle is None:
            place = (uniforms * self.nearest.shape[1]).long()
            others = self.nearest[image_tokens].gather(2, place[..., None]).squeeze(2)
        else:
            net = self.dalle.net
            assert net.text_tokenizer is not None  # load_dalle saw to it
            text = net.text_tokenizer.tokenize(captions, net.config.text_len, truncate=True).to(device)
            logits = net.image_logits(text, image_tokens[:, :-1]).float()
            others = SamplingConfig().pick(logits.flatten(0, 1), uniforms.flatten()).view(shape)
        return torch.where(chosen, others, image_tokens)


def nearest_codes(vectors: Float[Tensor, "k d"], count: int) -> Int[Tensor, "k m"]:
    """The nearest other codes of every code."""
    found = []
    for rows in torch.arange(len(vectors), device=vectors.device).split(ROWS):
        distances = torch.cdist(vectors[rows].float(), vectors.float())
        distances[torch.arange(len(rows)), rows] = torch.inf
        found.append(distances.topk(count, largest=False).indices)
    return torch.cat(found)


def load_dalle(path: str, vae: TrainableTokenizer) -> TextToImage:
    """A DALLE that speaks the tokens of an image tokenizer.

    Raises:
        FileNotFoundError: no such file, name or id.
        UserError: it is no DALLE, or has another image tokenizer or no text tokenizer.
    """
    dalle = load(path, kind="dalle")
    if token_differences(describe_tokenizer(dalle.vae), describe_tokenizer(vae)):
        raise UserError(
            f"perturbation.dalle={path} has another image tokenizer than the one that is trained: take it from there, "
            f"init={path}"
        )
    if dalle.text_tokenizer is None:
        raise UserError(f"perturbation.dalle={path} carries no text tokenizer to read captions with")
    return dalle
