"""The released image tokenizers under DALLE-pytorch's names: ``OpenAIDiscreteVAE()``, ``VQGanVAE(path, config)``.

Unlike there, any torch will do, nothing in the files is run, pictures may have any size that the network allows, and a
DALLE that was built on one is saved with it.
"""

from pathlib import Path

import torch
from torch import Tensor

from dalle_pytorch.checkpoints import hub
from dalle_pytorch.checkpoints.checkpoint import check_finite, config_of, load_state
from dalle_pytorch.checkpoints.importers import openai_dvae, taming
from dalle_pytorch.checkpoints.reader import mmap_scope, release
from dalle_pytorch.errors import UserError, refuse
from dalle_pytorch.models.openai_dvae import OpenAIDVAE
from dalle_pytorch.models.skeleton import skeleton
from dalle_pytorch.models.vqgan import VQGAN


class OpenAIDiscreteVAE(OpenAIDVAE):
    """OpenAI's dVAE: 8192 codes, a grid of an eighth of the side; frozen, in eval mode.

    Args:
        path: folder with encoder.pkl and decoder.pkl; None = downloaded once.
        image_size: side of the square picture, a multiple of 8.

    Raises:
        ValueError: files that cannot be read or downloaded; names them.
    """

    def __init__(self, path: str | Path | None = None, *, image_size: int = 256) -> None:
        folder = Path(path) if path is not None else hub.fetch("openai_dvae")
        with mmap_scope():
            head, state = openai_dvae.convert(folder, image_size=image_size)
            with skeleton():
                super().__init__(config_of(head))
            _fill(self, state, folder)
        self.num_layers, self.num_tokens = 3, self.codebook_size

    def get_codebook_indices(self, img: Tensor) -> Tensor:
        """Image tokens [b, n] of pictures [b, 3, H, W] in [0, 1]."""
        return self.encode(img)

    def forward(self, img: Tensor) -> Tensor:
        """Pictures [b, 3, H, W] after the codebook."""
        return self.decode(self.encode(img))


class VQGanVAE(VQGAN):
    """A VQGAN of taming-transformers, plain or Gumbel; frozen, in eval mode.

    Args:
        vqgan_model_path: its .ckpt; None = the one of ImageNet with 1024 codes, downloaded once.
        vqgan_config_path: its .yaml, compared with the weights; None = sizes are read from them, and ``image_size``
            is 256.
        image_size: side of the square picture, a multiple of what the net reduces by; None = the config's.

    Raises:
        ValueError: files that cannot be read or downloaded, or do not fit each other; names them.
    """

    def __init__(
        self,
        vqgan_model_path: str | Path | None = None,
        vqgan_config_path: str | Path | None = None,
        *,
        image_size: int | None = None,
    ) -> None:
        if vqgan_model_path is None:
            folder = hub.fetch("vqgan_f16_1024")
            vqgan_model_path, vqgan_config_path = folder / "vqgan.ckpt", vqgan_config_path or folder / "vqgan.yaml"
        config = None if vqgan_config_path is None else Path(vqgan_config_path)
        with mmap_scope():
            head, state = taming.convert(Path(vqgan_model_path), config=config, image_size=image_size)
            with skeleton():
                super().__init__(config_of(head))
            _fill(self, state, vqgan_model_path)
        self.num_layers = len(self.config.ch_mult) - 1
        self.num_tokens = self.codebook_size

    def get_codebook_indices(self, img: Tensor) -> Tensor:
        """Image tokens [b, n] of pictures [b, c, H, W] in [0, 1]."""
        return self.encode(img)

    def forward(self, img: Tensor) -> Tensor:
        """Pictures [b, c, H, W] after the codebook."""
        return self.decode(self.encode(img))


def _fill(vae: torch.nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Weights in fp32, frozen."""
    try:
        for name, stored in state.items():
            state[name] = stored.float()
            check_finite(name, state[name], stored)
            release()
        load_state(vae, state)
    except UserError as error:
        refuse(path, str(error))
    vae.requires_grad_(False).eval()
