"""``dalle_pytorch.dalle_pytorch`` of DALLE-pytorch."""

from dalle_pytorch.compat.dalle_pytorch import CLIP, DALLE, DiscreteVAE

__all__ = ["CLIP", "DALLE", "DiscreteVAE"]
