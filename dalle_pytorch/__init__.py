"""Train, evaluate and sample DALL·E-style models: a picture codebook, a caption-to-picture transformer, a ranker."""

import dalle_pytorch.threads  # noqa: F401  (before torch)

# isort: split
from dalle_pytorch.checkpoints.checkpoint import save
from dalle_pytorch.compat.dalle_pytorch import CLIP, DALLE, DiscreteVAE
from dalle_pytorch.compat.loading import load
from dalle_pytorch.compat.min_dalle import MinDalle
from dalle_pytorch.compat.names import package_attribute
from dalle_pytorch.compat.pretrained_vaes import OpenAIDiscreteVAE, VQGanVAE
from dalle_pytorch.generation.captions import caption_picture, image_log_likelihood
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.rerank import Scorer
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.clip import CLIPConfig
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.discrete_vae import DiscreteVAEConfig
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.models.vq_vae import VQVAE, VQVAEConfig

__getattr__ = package_attribute

__all__ = [
    "CLIP",
    "DALLE",
    "VQVAE",
    "CLIPConfig",
    "DALLEConfig",
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "Generator",
    "ImageTokenizer",
    "MinDalle",
    "OpenAIDiscreteVAE",
    "SamplingConfig",
    "Scorer",
    "VQGanVAE",
    "VQVAEConfig",
    "caption_picture",
    "image_log_likelihood",
    "load",
    "save",
]
