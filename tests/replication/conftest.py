"""The folder that experiments share, in small: an untrained image tokenizer and the tokens of a few pictures."""

from io import BytesIO

import pytest
import torch
from PIL import Image

import dalle_pytorch
from dalle_pytorch.data.encode import EncodeConfig, encode_folder
from dalle_pytorch.data.shards import ShardWriter


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    config = dalle_pytorch.DiscreteVAEConfig(
        image_size=16, num_layers=2, codebook_size=12, codebook_dim=8, hidden_dim=8
    )
    torch.manual_seed(0)
    (folder / "vae").mkdir()
    dalle_pytorch.save(dalle_pytorch.DiscreteVAE(config), folder / "vae" / "vae.safetensors")
    with ShardWriter(folder / "pictures", name="grey", image_size=16) as writer:
        for split, count in (("train", 18), ("val", 2), ("test_compose", 3)):
            for i in range(count):
                data = BytesIO()
                Image.linear_gradient("L").resize((16, 16)).point(lambda x, i=i: x * i // 18).save(data, "PNG")
                writer.write(split, f"{split}{i}", data.getvalue(), "png", {"captions": [f"grey number {i}"]})
    settings = EncodeConfig(vae=str(folder / "vae" / "vae.safetensors"), path=str(folder / "pictures"))
    encode_folder(settings, folder / "tokens", workers=1)
    return folder


@pytest.fixture
def captions_and_tokens():
    """Two captions, and as many rows of tokens for ``make_dalle``."""
    return torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]]), torch.arange(32).reshape(2, 16) * 5 % 12
