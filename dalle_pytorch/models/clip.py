"""CLIP: a text and an image tower that agree on matching pairs; ranks the candidates.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020, section 2. SigLIP's loss: Zhai et al. 2023,
https://arxiv.org/abs/2303.15343.

Axes: b batch, n texts, m images, t text tokens, c channels, H W pixels, p patches, e features.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.models.attention import EncoderView
from dalle_pytorch.models.checks import check_ids, check_pixels
from dalle_pytorch.models.transformer import Transformer, TransformerConfig
from dalle_pytorch.models.two_towers import TwoTowers
from dalle_pytorch.text import TextTokenizer

LOSSES = ("infonce", "siglip")
MAX_LOGIT_SCALE = math.log(100)  # section 2.5: clipped so that scores are never multiplied by more than 100


@dataclass(kw_only=True)
class CLIPConfig:
    """Sizes of the two towers."""

    dim_text: int = 512
    """Width of the text tower."""
    dim_image: int = 512
    """Width of the image tower."""
    dim_latent: int = 512
    """Width of the shared features."""
    text_vocab_size: int = 10_000
    """Text ids, padding (0) included; filled from the text tokenizer in training."""
    text_len: int = 256
    """Longest text in tokens."""
    text_enc_depth: int = 6
    """Blocks of the text tower."""
    text_heads: int = 8
    """Heads of the text tower; each dim_text / text_heads wide."""
    visual_enc_depth: int = 6
    """Blocks of the image tower."""
    visual_heads: int = 8
    """Heads of the image tower; each dim_image / visual_heads wide."""
    image_size: int = 256
    """Side of the square picture in pixels; other sizes are resized."""
    patch_size: int = 32
    """Side of a patch in pixels; divides image_size."""
    channels: int = 3
    """Picture channels."""
    dropout: float = 0.0
    """Dropout in both towers, in [0, 1)."""
    loss: str = "infonce"
    """"infonce" (CLIP: softmax over the batch) or "siglip" (each pair on its own; better in small batches)."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        if self.loss not in LOSSES:
            raise UserError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        at_least_one(
            self, "dim_text", "dim_image", "dim_latent", "text_vocab_size", "text_len", "text_enc_depth",
            "text_heads", "visual_enc_depth", "visual_heads", "image_size", "patch_size", "channels",
        )  # fmt: skip
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.image_size % self.patch_size:
            raise UserError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")
        for dim, heads in (("dim_text", "text_heads"), ("dim_image", "visual_heads")):
            if getattr(self, dim) % (2 * getattr(self, heads)):
                raise UserError(
                    f"{dim} ({getattr(self, dim)}) must be an even multiple of {heads} ({getattr(self, heads)})"
                )


class CLIPLoss(NamedTuple):
    """Loss of a batch of pairs and how often the right partner of the batch wins."""

    loss: Float[Tensor, ""]
    text_to_image_accuracy: Float[Tensor, ""]
    image_to_text_accuracy: Float[Tensor, ""]


class CLIP(TwoTowers):
    """Two transformers with mean pooling, linear projections and a learned scale.

    Args:
        config: sizes and loss.

    Source:
        Radford et al. 2021. Deviation: the towers of DALLE-pytorch (mean pooling, text not causal).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text_tokenizer: TextTokenizer | None = None
        """Turns prompts into text tokens; set by training and load()."""
        self.text_emb = nn.Embedding(config.text_vocab_size, config.dim_text)
        self.text_pos = nn.Embedding(config.text_len, config.dim_text)
        self.text_transformer = Transformer(
            tower(config.dim_text, config.text_enc_depth, config.text_heads, config.dropout)
        )
        self.to_text_latent = nn.Linear(config.dim_text, config.dim_latent, bias=False)

        patches = (config.image_size // config.patch_size) ** 2
        self.to_patches = nn.Linear(config.channels * config.patch_size**2, config.dim_image)
        self.image_pos = nn.Embedding(patches, config.dim_image)
        self.image_transformer = Transformer(
            tower(config.dim_image, config.visual_enc_depth, config.visual_heads, config.dropout)
        )
        self.to_image_latent = nn.Linear(config.dim_image, config.dim_latent, bias=False)

        siglip = config.loss == "siglip"
        # InfoNCE: temperature 0.07, section 2.5. SigLIP: scale 10 and bias -10, section 3 of its paper.
        self.log_logit_scale = nn.Parameter(torch.tensor(math.log(10) if siglip else math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if siglip else None
        for embedding, std in ((self.text_emb, 0.02), (self.text_pos, 0.01), (self.image_pos, 0.01)):
            nn.init.normal_(embedding.weight, std=std)  # as in OpenAI's CLIP, clip/model.py

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by in the loss, at most 100; the clamp lets the gradient through.

        A training calls ``clamp_logit_scale`` after each step; the clamp here is for files of trainings that did not.
        """
        excess = (self.log_logit_scale - MAX_LOGIT_SCALE).clamp(min=0).detach()
        return (self.log_logit_scale - excess).exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Hold the scale itself at 100 at most; call it after each optimiser step.

        A parameter that went on growing while its effect is clamped would need as many steps to come back.

        Source:
            Radford et al. 2021, section 2.5; open_clip, open_clip_train/train.py.
        """
        self.log_logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def encode_text(
        self, text_tokens: Int[Tensor, "b t"], text_mask: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b e"]:
        """Unit features of texts.

        Args:
            text_tokens: ids in [0, text_vocab_size), 0 = padding, at most text_len of them.
            text_mask: [b, t], true or not zero = read; None = every id but the padding.

        Raises:
            ValueError: too many tokens, or an id outside the vocabulary; names the numbers.
        """
        config = self.config
        if text_tokens.shape[1] > config.text_len:
            raise ValueError(f"{text_tokens.shape[1]} text tokens given, the model reads text_len = {config.text_len}")
        check_ids(text_tokens, config.text_vocab_size, "text", wait=False)
        mask = text_tokens != 0 if text_mask is None else text_mask.bool()
        if mask.shape != text_tokens.shape:
            raise ValueError(f"text_mask of shape {tuple(mask.shape)} given for text of {tuple(text_tokens.shape)}")
        # an empty text attends to its first pad: a softmax over nothing has no value
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = mask | (first & ~mask.any(dim=1, keepdim=True))
        x = self.text_emb(text_tokens) + self.text_pos.weight[: text_tokens.shape[1]]
        x = self.text_transformer(x, [EncoderView(mask[:, None, None, :])] * config.text_enc_depth)
        pooled = (x * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return F.normalize(self.to_text_latent(pooled).float(), dim=-1)

    def encode_image(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Unit features of pictures in [0, 1], resized to ``image_size`` where they differ.

        Raises:
            ValueError: another number of channels, or pixels that are no floats in [0, 1].
        """
        config = self.config
        check_pixels(images)
        if images.shape[1] != config.channels:
            raise ValueError(f"pictures of {images.shape[1]} channels given, the model reads {config.channels}")
        if tuple(images.shape[2:]) != (config.image_size, config.image_size):
            size = (config.image_size, config.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
        patch = config.patch_size
        patches = rearrange(images * 2 - 1, "b c (h p1) (w p2) -> b (h w) (c p1 p2)", p1=patch, p2=patch)
        views = [EncoderView()] * config.visual_enc_depth
        x = self.image_transformer(self.to_patches(patches) + self.image_pos.weight, views)
        return F.normalize(self.to_image_latent(x.mean(dim=1)).float(), dim=-1)

    def loss(
        self,
        text_tokens: Int[Tensor, "b t"],
        images: Float[Tensor, "b c H W"],
        text_mask: Shaped[Tensor, "..."] | None = None,
    ) -> CLIPLoss:
        """Contrastive loss of matching pairs against all other pairs of the batch."""
        return contrastive_loss(
            self.encode_text(text_tokens, text_mask), self.encode_image(images), self.logit_scale, self.logit_bias
        )


def contrastive_loss(
    text: Float[Tensor, "b e"],
    image: Float[Tensor, "b e"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""] | None,
    wrong_text: Float[Tensor, "b w e"] | None = None,
) -> CLIPLoss:
    """InfoNCE both ways, or SigLIP's sum over pairs / batch where a bias is given; features have unit length.

    Args:
        text: of the captions.
        image: of the pictures.
        logit_scale: factor of the cosines.
        logit_bias: SigLIP's.
        wrong_text: of more captions for each picture, to be told from its own; all 0 where there is none.

    Source:
        Wrong captions: Yuksekgonul et al. 2023 (NegCLIP), https://arxiv.org/abs/2210.01936. Deviation: each is a
        negative for its own picture only, since it may be right for another one.
    """
    wrong = None
    with torch.autocast(text.device.type, enabled=False):  # 8 bits of mantissa would tie scores of up to 100
        logits = logit_scale * text.float() @ image.float().T
        if wrong_text is not None:
            wrong = logit_scale * (wrong_text.float() @ image.float()[..., None]).squeeze(2)
            wrong = wrong.masked_fill(~wrong_text.any(dim=2), -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    if logit_bias is None:
        of_images = logits.T if wrong is None else torch.cat([logits.T, wrong], dim=1)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(of_images, target)) / 2
    else:
        sign = 2 * torch.eye(len(logits), device=logits.device) - 1
        pairs = -F.logsigmoid(sign * (logits + logit_bias)).sum()
        if wrong is not None:
            pairs = pairs + F.softplus(wrong + logit_bias).sum()
        loss = pairs / len(logits)
    return CLIPLoss(
        loss,
        (logits.argmax(dim=1) == target).float().mean(),
        (logits.argmax(dim=0) == target).float().mean(),
    )


def tower(dim: int, depth: int, heads: int, dropout: float) -> TransformerConfig:
    """Shape of one tower."""
    return TransformerConfig(
        dim=dim, depth=depth, heads=heads, head_dim=dim // heads, attn_dropout=dropout, ff_dropout=dropout
    )
