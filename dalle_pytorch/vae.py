"""``dalle_pytorch.vae`` of DALLE-pytorch."""

from dalle_pytorch.compat.pretrained_vaes import OpenAIDiscreteVAE, VQGanVAE

__all__ = ["OpenAIDiscreteVAE", "VQGanVAE"]
