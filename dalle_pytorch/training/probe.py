"""Training of the probe that judges pictures: labels by factor, pictures made soft, accuracy on held-out ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.data.batches import Batch
from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.models.image_tokenizer import as_image_tokenizer
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.probe import UNKNOWN, Probe, ProbeConfig
from dalle_pytorch.training.base import LitBase, tile
from dalle_pytorch.training.config import RunConfig

SHOWN = 8
"""Pictures in a row: those it takes for right, then those it takes for wrong."""


@dataclass(kw_only=True)
class TrainProbeConfig(RunConfig):
    """Settings of ``dalle-train-probe``."""

    model: ProbeConfig = field(default_factory=ProbeConfig)
    """Sizes of the probe; classes are filled from the training split."""
    min_pictures: int = 2
    """A value is a class of the probe if the training split has so many pictures of it; the others are left out."""
    soft: float = 0.2
    """Share of the training pictures that are scaled down to half and up again, as soft as a DALLE draws; in [0, 1]."""
    vae: str | None = None
    """Checkpoint of the image tokenizer of the DALLE that is to be judged: pictures of training pass through it, for
    what it loses is no mistake of the DALLE. Held-out ones are looked at both ways, and the mean accuracy chooses."""
    decoded: float = 0.5
    """Share of a batch that passes through ``vae``; in [0, 1]."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range, or classes are given; names it.
        """
        super().__post_init__()
        at_least_one(self, "min_pictures")
        for name in ("soft", "decoded"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.model.classes:
            raise UserError("model.classes is filled from the training split: leave it out")


class LitProbe(LitBase[Probe]):
    """Trains a Probe.

    Args:
        net: the probe.
        config: settings.
        train: factors of every training picture, in order.
        val: factors of every validation picture, in order.
        reconstruct: gives pictures back as the image tokenizer of ``config.vae`` does.
    """

    monitor = "val/accuracy"
    monitor_mode = "max"

    def __init__(
        self,
        net: Probe,
        config: TrainProbeConfig,
        train: Sequence[Mapping[str, str]],
        val: Sequence[Mapping[str, str]],
        reconstruct: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(net, config.optim, config.seed)
        self.soft, self.decoded, self.reconstruct = config.soft, config.decoded, reconstruct
        self.train_labels, self.val_labels = net.labels(train), net.labels(val)
        self.ways: dict[str, Callable[[Tensor], Tensor]] = {"": lambda images: images}
        if reconstruct is not None:
            self.ways["_decoded"] = reconstruct
        self.counts: dict[str, Tensor] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Loss of a batch."""
        images = self.degraded(batch["images"], self.step_generator(batch_idx, batch["images"].device))
        loss = self.net.loss(images, self.train_labels[batch["indices"].cpu()].to(images.device))
        self.log_losses("train", {"loss": loss}, len(images))
        return loss

    def degraded(self, images: Float[Tensor, "b 3 H W"], generator: torch.Generator) -> Float[Tensor, "b 3 H W"]:
        """Some pictures softened, and the first ones (batches are shuffled) through the image tokenizer."""
        images = softened(images, self.soft, generator)
        count = round(self.decoded * len(images))
        if self.reconstruct is None or not count:
            return images
        return torch.cat([self.reconstruct(images[:count]), images[count:]])

    def on_validation_epoch_start(self) -> None:
        """Start the counts."""
        self.counts = {way: torch.zeros(2, len(self.net.config.classes), device=self.device) for way in self.ways}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count pictures with a label, and those that it is seen in."""
        labels = self.val_labels[batch["indices"].cpu()].to(self.device)
        for way, counts in self.counts.items():
            logits = self.net(self.ways[way](batch["images"])).values()
            seen = torch.stack([scores.argmax(dim=1) for scores in logits], dim=1)
            counts += torch.stack([(seen == labels).sum(dim=0), (labels != UNKNOWN).sum(dim=0)])

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy of each factor, as it is and through the image tokenizer, and the mean of all."""
        means = []
        for way, counts in self.counts.items():
            if self.trainer.world_size > 1:
                counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
            right, total = counts
            shares = right / total.clamp_min(1)
            for name, share in zip(self.net.config.classes, shares, strict=True):
                self.log(f"val/{name}{way}", share, prog_bar=True, sync_dist=True)
            means.append(shares[total > 0].sum() / (total > 0).sum().clamp_min(1))
        self.log("val/accuracy", torch.stack(means).mean(), sync_dist=True)

    def pictures(self, batch: Batch) -> Float[Tensor, "3 H W"]:
        """Pictures that are seen as what they are in all factors, above others."""
        labels = self.val_labels[batch["indices"].cpu()].to(self.device)
        with eval_mode(self.net):
            seen = torch.stack([logits.argmax(dim=1) for logits in self.net(batch["images"]).values()], dim=1)
        wrong = ((seen != labels) & (labels != UNKNOWN)).any(dim=1)
        rows = [batch["images"][part][:SHOWN] for part in (~wrong, wrong)]
        blank = torch.ones_like(batch["images"][:1])
        return tile(torch.cat([torch.cat([row, blank.expand(SHOWN - len(row), -1, -1, -1)]) for row in rows]), SHOWN)


def through(vae: nn.Module) -> Callable[[Float[Tensor, "b 3 H W"]], Float[Tensor, "b 3 H W"]]:
    """What gives pictures back as an image tokenizer does, in fp32; not part of what is saved.

    Raises:
        ValueError: it is no image tokenizer.
    """
    tokenizer = as_image_tokenizer(vae)

    def reconstruct(images: Tensor) -> Tensor:
        vae.to(images.device)
        with eval_mode(vae), torch.autocast(images.device.type, enabled=False):
            return tokenizer.decode(tokenizer.encode(images.float())).to(images.dtype)

    return reconstruct


def softened(images: Float[Tensor, "b 3 H W"], share: float, generator: torch.Generator) -> Float[Tensor, "b 3 H W"]:
    """Pictures, some of which have lost the finer half of their detail."""
    half = F.interpolate(F.avg_pool2d(images, 2), images.shape[2:], mode="bilinear")
    chosen = torch.rand(len(images), generator=generator, device=images.device) < share
    return torch.where(chosen[:, None, None, None], half, images)
