"""What our CLIP and the released ones share: cosines of texts and images, and the score that ranks candidates.

Axes: b batch, n texts, m images, t text tokens, c channels, H W pixels, e features.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.text import TextTokenizer

SCORED_TOGETHER = 256
"""Images in one call of the image tower."""


class TwoTowers(nn.Module, ABC):
    """A text and an image tower whose unit features agree on matching pairs; a ``generation.rerank.Scorer``.

    Attributes:
        config: sizes, ``text_len`` and ``image_size`` among them.
        text_tokenizer: turns prompts into text tokens; set by training, importers and load().
        log_logit_scale: logarithm of what cosines are multiplied by in the loss.
        logit_bias: SigLIP's, None = InfoNCE.
    """

    config: Any
    text_tokenizer: TextTokenizer | None
    log_logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None

    @property
    @abstractmethod
    def logit_scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied by in the loss."""

    @abstractmethod
    def encode_text(
        self, text_tokens: Int[Tensor, "b t"], text_mask: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "b e"]:
        """Unit features of texts.

        Args:
            text_tokens: ids of ``text_tokenizer``, 0 = padding, at most ``config.text_len`` of them.
            text_mask: [b, t], true or not zero = read; None = every id but the padding.
        """

    @abstractmethod
    def encode_image(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Unit features of images in [0, 1], of any size."""

    def scores(
        self,
        text_tokens: Int[Tensor, "n t"],
        images: Float[Tensor, "m c H W"],
        text_mask: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "n m"]:
        """Cosine of every text with every image, in [-1, 1], without the logit scale."""
        return self.encode_text(text_tokens, text_mask) @ self.encode_image(images).T

    def tokenize(self, texts: str | Sequence[str]) -> Int[Tensor, "n t"]:
        """Text tokens on the device of the weights; texts longer than the context are cut.

        Raises:
            UserError: the network carries no text tokenizer.
        """
        if self.text_tokenizer is None:
            raise UserError(
                "this clip carries no text tokenizer, so it cannot read prompts; set clip.text_tokenizer, "
                "or load a checkpoint that our training wrote"
            )
        texts = texts if isinstance(texts, str) else list(texts)
        return self.text_tokenizer.tokenize(texts, self.config.text_len, truncate=True).to(self.log_logit_scale.device)

    def score(self, images: Float[Tensor, "m c H W"], prompt: str) -> Float[Tensor, " m"]:
        """Cosine of the prompt with every image, in [-1, 1], on the CPU; dropout off, no gradients.

        Args:
            images: in [0, 1], on any device.
            prompt: cut to the context where it is longer.

        Raises:
            UserError: the network carries no text tokenizer.
        """
        tokens = self.tokenize(prompt)
        with eval_mode(self):
            parts = [self.scores(tokens, part.to(tokens.device))[0].cpu() for part in images.split(SCORED_TOGETHER)]
        return torch.cat(parts)
