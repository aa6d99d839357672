"""What the three importers of CLIPs share: sizes from the shapes of weights, and weights that come in another form."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dalle_pytorch.checkpoints.importers.table import Table
from dalle_pytorch.checkpoints.reader import release
from dalle_pytorch.errors import UserError
from dalle_pytorch.models.pretrained_clip import PretrainedCLIPConfig

PARTS = ("q", "k", "kv", "v")
TRANSPOSED = ".T"
"""Ends the target of a matrix that the source keeps as [in, out]."""


def block_rows(source: str, target: str, names: Mapping[str, str]) -> Table:
    """Rows of a table for the blocks of one tower.

    Args:
        source: regular expression of the start of a block's keys, the number as its group.
        target: our name of the tower.
        names: what follows before "weight" or "bias", and our name of the layer.
    """
    return {rf"{source}{layer}(weight|bias)": rf"{target}.blocks.\1.{ours}.\2" for layer, ours in names.items()}


def finish(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fuse ``NAME.q``, ``.k``, ``.v`` (or ``.q``, ``.kv``), transpose ``NAME.T``, drop axes that we do not have.

    Args:
        weights: renamed ones; used up.

    Raises:
        ValueError: a part is missing; names it.
    """
    for name in [key.removesuffix(".q") for key in weights if re.search(r"\.qkv\.\w+\.q$", key)]:
        parts = [weights.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in weights]
        weights[name] = torch.cat(parts)
        release()
        if len(weights[name]) != 3 * len(parts[0]):
            raise UserError(f"{name}: the weights of query, key and value are not all there")
    for name in [key for key in weights if key.endswith(TRANSPOSED)]:
        weights[name.removesuffix(TRANSPOSED)] = weights.pop(name).T.contiguous()
        release()
    for name, ndim in (("log_logit_scale", 0), ("logit_bias", 0), ("image.pool.query", 1), ("image.positions", 2)):
        while name in weights and weights[name].ndim > ndim and weights[name].shape[0] == 1:
            weights[name] = weights[name][0]
    return weights


def sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of ``PretrainedCLIPConfig`` that shapes tell: all sizes but heads.

    Raises:
        ValueError: a weight that is needed is missing or of another shape; names it.
    """
    context_len, text_width = shape(weights, "text.positions", 2)
    return {
        "embed_dim": shape(weights, "text.proj.weight", 2)[0],
        **(_resnet_sizes(weights) if "image.pool.positions" in weights else _transformer_sizes(weights)),
        "text_vocab_size": shape(weights, "text.tokens.weight", 2)[0],
        "context_len": context_len,
        "text_width": text_width,
        "text_depth": count(weights, "text.blocks."),
        "text_hidden": shape(weights, "text.blocks.0.up.weight", 2)[0],
        "text_proj_bias": "text.proj.bias" in weights,
        "logit_bias": "logit_bias" in weights,
    }


def _transformer_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, _, patch_size = shape(weights, "image.patches.weight", 4)
    by_class = "image.class_token" in weights
    patches = shape(weights, "image.positions", 2)[0] - by_class
    grid = round(patches**0.5)
    if grid**2 != patches:
        raise UserError(f"image.positions are of {patches} patches, which is no square")
    return {
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "image_width": width,
        "image_depth": count(weights, "image.blocks."),
        "image_hidden": shape(weights, "image.blocks.0.up.weight", 2)[0],
        "image_pool": "class" if by_class else "attention",
    }


def _resnet_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    grid = round((shape(weights, "image.pool.positions", 2)[0] - 1) ** 0.5)
    return {
        "image_size": 32 * grid,
        "image_width": shape(weights, "image.conv3.weight", 4)[0],
        "image_stages": [count(weights, f"image.stages.{stage}.") for stage in range(4)],
    }


def shape(weights: Mapping[str, Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """Shape of a weight that must be there.

    Raises:
        ValueError: it is not, or has another number of axes.
    """
    if name not in weights:
        raise UserError(f"a weight is missing: {name}")
    if weights[name].ndim != ndim:
        raise UserError(f"weight {name} of shape {tuple(weights[name].shape)} should have {ndim} axes")
    return tuple(weights[name].shape)


def count(weights: Mapping[str, Tensor], start: str) -> int:
    """One more than the largest number that follows in keys that start so.

    Raises:
        ValueError: no key does.
    """
    found = [int(match[1]) for key in weights if (match := re.match(rf"{re.escape(start)}(\d+)\.", key))]
    if not found:
        raise UserError(f"weights are missing: {start}*")
    return max(found) + 1


def make_config(weights: Mapping[str, Tensor], told: Mapping[str, Any]) -> PretrainedCLIPConfig:
    """The config of weights with what their shapes do not tell.

    Args:
        weights: renamed and finished.
        told: fields from a config file; a size that is told must be that of the weights, but for the pixels that a
            whole number of patches leaves over.

    Raises:
        ValueError: a size is told that the weights do not have, or a field is out of range; names it.
    """
    found = sizes(weights)
    for name, value in told.items():
        if name == "image_size" and not found.get("image_stages") and 0 <= value - found[name] < found["patch_size"]:
            continue
        if name in found and found[name] != value:
            raise UserError(f"the config says {name} = {value}, the weights {found[name]}")
    return PretrainedCLIPConfig(**{**found, **told})
