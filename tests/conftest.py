"""Small models and seeded randomness for all tests."""

import logging

import pytest
import torch

from dalle_pytorch import CLIP, DALLE, CLIPConfig, DALLEConfig, DiscreteVAE, DiscreteVAEConfig
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig


@pytest.fixture(autouse=True)
def seeded():
    """The same weights and data in every run, on one thread: tiny matrices gain nothing from more."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logging_left_as_found():
    """Commands install Hydra's log handlers, which write to a stream that pytest closes after the test."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    for handler in root.handlers[:]:
        if handler not in before:
            root.removeHandler(handler)


@pytest.fixture
def tiny_vae():
    """A 4 x 4 grid of 12 codes over 16 x 16 pictures."""
    return DiscreteVAE(
        DiscreteVAEConfig(image_size=16, num_layers=2, codebook_size=12, codebook_dim=8, hidden_dim=8)
    ).eval()


@pytest.fixture
def make_dalle(tiny_vae):
    """Build a small DALLE with settings of choice; weights large enough that outputs depend on inputs."""

    def make(**settings) -> DALLE:
        defaults = {"dim": 32, "depth": 3, "heads": 2, "head_dim": 16, "text_vocab_size": 9, "text_len": 5}
        dalle = DALLE(DALLEConfig(**{**defaults, **settings}), vae=tiny_vae).eval()
        with torch.no_grad():
            for parameter in dalle.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        return dalle

    return make


@pytest.fixture
def make_bart(tiny_vae):
    """Build a small DALLEBart; weights large enough that outputs depend on inputs."""

    def make(**settings) -> DALLEBart:
        sizes = {
            "dim": 32, "encoder_layers": 2, "decoder_layers": 3, "heads": 2, "ffn_dim": 24, "grid_size": 4,
            "text_vocab_size": 9, "text_positions": 7, "image_vocab_size": 15, "bos_id": 12,
        }  # fmt: skip
        bart = DALLEBart(DALLEBartConfig(**{**sizes, **settings}), vae=tiny_vae).eval()
        with torch.no_grad():
            for parameter in bart.parameters():
                if parameter.requires_grad:
                    parameter += 0.15 * torch.randn_like(parameter)
        return bart

    return make


@pytest.fixture
def tiny_clip():
    """Two small towers over 16 x 16 pictures."""
    return CLIP(
        CLIPConfig(
            dim_text=16,
            dim_image=16,
            dim_latent=8,
            text_vocab_size=9,
            text_len=5,
            text_enc_depth=1,
            text_heads=2,
            visual_enc_depth=1,
            visual_heads=2,
            image_size=16,
            patch_size=4,
        )
    ).eval()
