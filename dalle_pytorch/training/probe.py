"""Training of the probe that judges pictures: labels by factor, pictures made soft, accuracy on held-out ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.data.batches import Batch
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.probe import UNKNOWN, Probe, ProbeConfig
from dalle_pytorch.ranges import at_least_one
from dalle_pytorch.training.base import LitBase, tile
from dalle_pytorch.training.run import RunConfig

SHOWN = 8
"""Pictures in a row: those it takes for right, then those it takes for wrong."""


@dataclass(kw_only=True)
class TrainProbeConfig(RunConfig):
    """Settings of ``python -m dalle_pytorch.commands.train_probe``."""

    model: ProbeConfig = field(default_factory=ProbeConfig)
    """Sizes of the probe; classes are filled from the training split."""
    min_pictures: int = 2
    """A value is a class of the probe if the training split has so many pictures of it; the others are left out."""
    soft: float = 0.2
    """Share of the training pictures that are scaled down to half and up again, as soft as a DALLE draws; in [0, 1]."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range, or classes are given; names it.
        """
        super().__post_init__()
        at_least_one(self, "min_pictures")
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft must lie in [0, 1], got {self.soft}")
        if self.model.classes:
            raise ValueError("model.classes is filled from the training split: leave it out")


class LitProbe(LitBase[Probe]):
    """Trains a Probe.

    Args:
        net: the probe.
        config: settings.
        train: factors of every training picture, in order.
        val: factors of every validation picture, in order.
    """

    monitor = "val/accuracy"
    monitor_mode = "max"

    def __init__(
        self,
        net: Probe,
        config: TrainProbeConfig,
        train: Sequence[Mapping[str, str]],
        val: Sequence[Mapping[str, str]],
    ) -> None:
        super().__init__(net, config.optim, config.seed)
        self.soft, self.train_labels, self.val_labels = config.soft, net.labels(train), net.labels(val)
        self.counts = torch.zeros(2, len(net.config.classes))

    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        """Loss of a batch."""
        generator = self.step_generator(batch_idx, batch["images"].device)
        images = softened(batch["images"], self.soft, generator)
        loss = self.net.loss(images, self.train_labels[batch["indices"].cpu()].to(images.device))
        self.log_losses("train", {"loss": loss}, len(images))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the counts."""
        self.counts = torch.zeros(2, len(self.net.config.classes), device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count pictures with a label, and those that it is seen in."""
        labels = self.val_labels[batch["indices"].cpu()].to(self.device)
        seen = torch.stack([logits.argmax(dim=1) for logits in self.net(batch["images"]).values()], dim=1)
        self.counts += torch.stack([(seen == labels).sum(dim=0), (labels != UNKNOWN).sum(dim=0)])

    def on_validation_epoch_end(self) -> None:
        """Log the accuracy of each factor, and their mean."""
        if self.trainer.world_size > 1:
            self.counts = self.trainer.strategy.reduce(self.counts, reduce_op="sum")
        right, total = self.counts
        shares = right / total.clamp_min(1)
        for name, share in zip(self.net.config.classes, shares, strict=True):
            self.log(f"val/{name}", share, prog_bar=True, sync_dist=True)
        self.log("val/accuracy", shares[total > 0].sum() / (total > 0).sum().clamp_min(1), sync_dist=True)

    def pictures(self, batch: Batch) -> Float[Tensor, "3 H W"]:
        """Pictures that are seen as what they are in all factors, above others."""
        labels = self.val_labels[batch["indices"].cpu()].to(self.device)
        with eval_mode(self.net):
            seen = torch.stack([logits.argmax(dim=1) for logits in self.net(batch["images"]).values()], dim=1)
        wrong = ((seen != labels) & (labels != UNKNOWN)).any(dim=1)
        rows = [batch["images"][part][:SHOWN] for part in (~wrong, wrong)]
        blank = torch.ones_like(batch["images"][:1])
        return tile(torch.cat([torch.cat([row, blank.expand(SHOWN - len(row), -1, -1, -1)]) for row in rows]), SHOWN)


def softened(images: Float[Tensor, "b 3 H W"], share: float, generator: torch.Generator) -> Float[Tensor, "b 3 H W"]:
    """Pictures, some of which have lost the finer half of their detail."""
    half = F.interpolate(F.avg_pool2d(images, 2), images.shape[2:], mode="bilinear")
    chosen = torch.rand(len(images), generator=generator, device=images.device) < share
    return torch.where(chosen[:, None, None, None], half, images)
