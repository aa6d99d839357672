"""Training of the CLIP that ranks candidates."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dalle_pytorch.data.batches import Batch
from dalle_pytorch.models.clip import CLIP, CLIPConfig, CLIPLoss, contrastive_loss
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.text.phrases import check_phrases, swapped_captions
from dalle_pytorch.training.base import LitBase, tile
from dalle_pytorch.training.config import RunConfig
from dalle_pytorch.training.text import TextConfig
from dalle_pytorch.training.wrong_captions import read_wrong

SHOWN_CAPTIONS = 8  # captions in a retrieval grid, a row each
SHOWN_MATCHES = 5  # best pictures of each, after the true one


@dataclass(kw_only=True)
class TrainCLIPConfig(RunConfig):
    """Settings of train_clip.py."""

    model: CLIPConfig = field(default_factory=CLIPConfig)
    """Sizes of the CLIP; text_vocab_size is filled from the text tokenizer."""
    text: TextConfig = field(default_factory=TextConfig)
    """Text tokenizer."""
    contrast_phrases: list[str] = field(default_factory=list)
    """Phrases that exclude each other, such as the names of styles: a picture's caption is also told from the same with
    each of the others in place of its own. Among the captions of a batch hardly any differ from it by that alone."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: phrases that cannot take each other's place.
        """
        super().__post_init__()
        check_phrases(self.contrast_phrases, "contrast_phrases")


class LitCLIP(LitBase[CLIP]):
    """Trains a CLIP. Recall is within a validation batch: it depends on data.batch_size."""

    monitor = "val/loss"

    def __init__(self, net: CLIP, config: TrainCLIPConfig) -> None:
        super().__init__(net, config.optim, config.seed)
        self.contrast_phrases, self.bpe_dropout = config.contrast_phrases, config.text.bpe_dropout

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Loss of the pairs of a batch."""
        result = self.loss(batch, self.wrong_text(batch, batch_idx) if self.contrast_phrases else None)
        values = {"loss": result.loss, "logit_scale": self.net.logit_scale}
        self.log_losses("train", values, len(batch["captions"]))
        return result.loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step, and the bound of the logit scale."""
        super().optimizer_step(*args, **kwargs)
        self.net.clamp_logit_scale()

    def wrong_text(self, batch: Batch, batch_idx: int) -> Int[Tensor, "b w t"]:
        """Tokens of every caption with each other phrase; all 0 where it holds none, or is cut before it."""
        count, length = len(self.contrast_phrases) - 1, self.net.config.text_len
        wrong, own, rngs = [], [], []
        for caption, rng in zip(batch["captions"], self.sample_rngs(batch, batch_idx, "contrast"), strict=True):
            wrong += swapped_captions(caption, self.contrast_phrases) or [caption] * count
            own += [caption] * count
            rngs += [rng] * count
        tokens, differ = read_wrong(wrong, own, self.net.text_tokenizer, length, dropout=self.bpe_dropout, rngs=rngs)
        return (tokens * differ[:, None]).view(-1, count, length).to(batch["text_tokens"].device)

    def loss(self, batch: Batch, wrong_text: Int[Tensor, "b w t"] | None = None) -> CLIPLoss:
        """Loss of the pairs of all processes, in each; the mean of their gradients is that of one big batch."""
        features = [self.net.encode_text(batch["text_tokens"]), self.net.encode_image(batch["images"])]
        if wrong_text is not None:
            # all rows, wanted or not: every process must take the same way. Features of length 0 count as none.
            wrong = self.net.encode_text(wrong_text.flatten(0, 1)).view(*wrong_text.shape[:2], -1)
            features.append(wrong * wrong_text.any(dim=2, keepdim=True))
        if self.trainer.world_size > 1:
            features = [self.gather(x) for x in features]
        text, image, *wrong = features
        return contrastive_loss(text, image, self.net.logit_scale, self.net.logit_bias, *wrong)

    def gather(self, features: Float[Tensor, "b ... e"]) -> Float[Tensor, "all ... e"]:
        """Features of all processes, with gradients."""
        together = self.all_gather(features, sync_grads=True)
        assert isinstance(together, Tensor)
        return together.flatten(0, 1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss, and how often the right partner of the batch wins."""
        result = self.loss(batch)
        values = {
            "loss": result.loss,
            "text_to_image_r1": result.text_to_image_accuracy,
            "image_to_text_r1": result.image_to_text_accuracy,
        }
        self.log_losses("val", values, len(batch["captions"]), bar="text_to_image_r1")

    def pictures(self, batch: Batch) -> Float[Tensor, "3 H W"]:
        """A row a caption: its own picture, then the pictures of the batch that score best, best first."""
        images = batch["images"]
        with eval_mode(self.net):
            texts = self.net.encode_text(batch["text_tokens"][:SHOWN_CAPTIONS])
            scores = texts @ self.net.encode_image(images).T
        best = scores.topk(min(SHOWN_MATCHES, len(images)), dim=1).indices
        rows = [torch.cat([images[i : i + 1], images[row]]) for i, row in enumerate(best)]
        return tile(torch.cat(rows), columns=1 + best.shape[1])
