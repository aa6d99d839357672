"""``dalle_pytorch.load``: models that also answer to the names of DALLE-pytorch's users."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dalle_pytorch.checkpoints import loading
from dalle_pytorch.compat.dalle_pytorch import CLIP, DALLE, DiscreteVAE

_CLASSES = {named.__base__: named for named in (DiscreteVAE, DALLE, CLIP)}


def load(
    weights: str | Path,
    *,
    kind: str | None = None,
    source: str | None = None,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> Any:
    """A model, ready to use. Nothing in a file is executed.

    Args:
        weights: a checkpoint of ours (file or folder), a file or folder of another program's, a name of
            ``checkpoints.hub.RELEASES`` ("emoji" = the weights that come along), or an id of the Hugging Face hub.
        kind: "vae" (any image tokenizer), "dalle", "clip" or "probe" if nothing else will do; None = any. Of "emoji" it
            says which is meant; None = its DALLE.
        source: the format of a foreign file, a name of ``checkpoints.sources.SOURCES``; None = found from its content.
        map_location: device of the weights.
        dtype: of the weights; None = as they are stored.
        **options: what the importer of this source takes beyond the path.

    Returns:
        The model in eval mode, with its tokenizers; a DiscreteVAE, DALLE or CLIP with the methods of DALLE-pytorch.

    Raises:
        FileNotFoundError: no such file, name or id.
        UserError: it cannot be read, is of another kind, or its weights do not fit; names the culprit.
    """
    return with_names(
        loading.load(weights, kind=kind, source=source, map_location=map_location, dtype=dtype, **options)
    )


def with_names(model: nn.Module) -> nn.Module:
    """The same model, its class and that of its image tokenizer replaced by DALLE-pytorch's; neither holds more."""
    for part in (model, getattr(model, "vae", None)):
        if type(part) in _CLASSES:
            part.__class__ = _CLASSES[type(part)]  # type: ignore[bad-argument-type]
    return model
