"""An image encoder of transformers (DINOv2, ViT, ResNet, ...), behind one method: images in [0, 1] to features.

Axes: b batch, c channels, H W pixels, e features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PretrainedEncoder(nn.Module):
    """A model of transformers and how it wants its images.

    Args:
        net: takes ``pixel_values``, gives ``pooler_output`` or ``last_hidden_state``, whose first place is the class
            token.
        name: of the kind of network, for reports.
        image_size: side of the square images that it reads, pixels.
        mean: subtracted from each channel.
        std: divides each channel.
        pooled: read ``pooler_output`` where there is one; not where the weights are of a model without it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, net: Any, name: str, image_size: int, mean: list[float], std: list[float], *, pooled: bool = True
    ) -> None:
        super().__init__()
        self.pooled = pooled
        self.net, self.name, self.image_size = net, name, image_size
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def encode(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Features of images in [0, 1], resized to what the network reads."""
        size = (self.image_size, self.image_size)
        images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        found = self.net(pixel_values=(images - self.mean) / self.std)
        pooled = getattr(found, "pooler_output", None) if self.pooled else None
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
