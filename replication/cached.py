"""A DALLE that an arm trains in its own process, because something stands between its gradients and its weights.

Batches, text tokenizer and held-out pairs are those of ``train_dalle.py experiment=replicate`` with the same seed.

Axes: b pairs, t text tokens, n image tokens.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.data.batches import Batch, ResumableLoader
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.evaluation.likelihood import likelihoods
from dalle_pytorch.models.dalle import DALLE, DALLEConfig
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.text import BPETokenizer
from replication.arms import Curve
from replication.pictures import HELD_OUT

TEXT_LEN, VOCAB_SIZE = 16, 2048
"""As in experiment=replicate."""
POINTS = 50
"""Of a curve over steps."""


class Cached(NamedTuple):
    """What a training needs besides its network."""

    vae: ImageTokenizer
    vocab_size: int
    """Of the text."""
    loader: ResumableLoader
    """Batches of an epoch; each time it is walked through, those of the next."""
    text_tokens: Int[Tensor, "b t"]
    """Held out."""
    image_tokens: Int[Tensor, "b n"]
    """Theirs."""


def open_cached(shared: Path, *, batch_size: int, seed: int) -> Cached:
    """The cached tokens that ``dalles.prepare`` made.

    Raises:
        FileNotFoundError: they are not there.
    """
    vae = checkpoint.load(shared / "vae" / "vae.safetensors", kind="vae")
    config = DataConfig(path=str(shared / "tokens"), batch_size=batch_size, val_split=HELD_OUT)
    data = TextImageDataModule(config, image_size=vae.image_size, seed=seed, tokens=True)
    tokenizer = BPETokenizer.train(list(data.train_set.some_captions()), VOCAB_SIZE)
    data.set_text(tokenizer, TEXT_LEN, truncate=True, dropout=0.0)
    loader, parts = data.train_dataloader(), list(data.val_dataloader())
    assert isinstance(loader, ResumableLoader)  # a folder's, no stream's
    text, image = (torch.cat([part[name] for part in parts]) for name in ("text_tokens", "image_tokens"))
    return Cached(vae, tokenizer.vocab_size, loader, text, image)


def make_dalle(cached: Cached, config: DALLEConfig, seed: int) -> DALLE:
    """A DALLE with the weights of the seed, ready for training."""
    torch.manual_seed(seed)
    return DALLE(config, vae=cached.vae).train()


def batches(cached: Cached, steps: int) -> Iterator[Batch]:
    """So many batches, epoch after epoch."""
    while steps > 0:
        for _, batch in zip(range(steps), cached.loader, strict=False):
            yield batch
            steps -= 1


def held_out(dalle: DALLE, cached: Cached) -> dict[str, float]:
    """Nats per token of held-out pairs, as in the runs of ``dalles``."""
    found = likelihoods(dalle, cached.text_tokens, cached.image_tokens)
    assert found.text is not None
    assert found.text_tokens is not None
    return {
        "image_val": found.image.mean().item() / cached.image_tokens.shape[1],
        "text_val": (found.text.sum() / found.text_tokens.sum()).item(),
    }


def over_steps(values: Sequence[float]) -> Curve:
    """Means of neighbours, POINTS of them at most, at the last step of each."""
    size = -(-len(values) // POINTS)
    groups = [values[start : start + size] for start in range(0, len(values), size)]
    ends = [min(start + size, len(values)) for start in range(0, len(values), size)]
    return Curve(ends, [sum(group) / len(group) for group in groups])
