"""What a checkpoint says about its model: {kind, version, config, text_tokenizer, vae, training}; JSON can hold it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dalle_pytorch.compat import CLIP, DALLE, DiscreteVAE
from dalle_pytorch.models.clip import CLIPConfig
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.models.discrete_vae import DiscreteVAEConfig
from dalle_pytorch.models.openai_dvae import OpenAIDVAE, OpenAIDVAEConfig
from dalle_pytorch.models.pretrained_clip import PretrainedCLIP, PretrainedCLIPConfig
from dalle_pytorch.models.probe import Probe, ProbeConfig
from dalle_pytorch.models.skeleton import skeleton
from dalle_pytorch.models.vq_vae import VQVAE, VQVAEConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
from dalle_pytorch.text import TextTokenizer, text_tokenizer_from_state

Header: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Tensor]


class Kind(NamedTuple):
    """A network that can be saved."""

    role: str
    """What it can stand for: "vae" (an image tokenizer), "dalle" (captions to image tokens), "clip" (a ranker) or
    "probe" (a classifier)."""
    model: type[Any]
    config: type[Any]


VERSION = 1
KINDS: dict[str, Kind] = {
    "vae": Kind("vae", DiscreteVAE, DiscreteVAEConfig),
    "vq_vae": Kind("vae", VQVAE, VQVAEConfig),
    "openai_dvae": Kind("vae", OpenAIDVAE, OpenAIDVAEConfig),
    "vqgan": Kind("vae", VQGAN, VQGANConfig),
    "dalle": Kind("dalle", DALLE, DALLEConfig),
    "dalle_bart": Kind("dalle", DALLEBart, DALLEBartConfig),
    "clip": Kind("clip", CLIP, CLIPConfig),
    "pretrained_clip": Kind("clip", PretrainedCLIP, PretrainedCLIPConfig),
    "probe": Kind("probe", Probe, ProbeConfig),
}


def make_header(
    config: Any,
    *,
    text_tokenizer: TextTokenizer | None = None,
    vae: Header | None = None,
    training: Mapping[str, Any] | None = None,
) -> Header:
    """A header from its parts.

    Args:
        config: a dataclass of one of the KINDS.
        text_tokenizer: of a DALLE or a CLIP.
        vae: header of a DALLE's image tokenizer, whose weights are called ``vae.*``.
        training: free notes (step, metrics, settings).

    Raises:
        ValueError: the config is of no known kind; names its class.
    """
    kind = next((kind for kind, row in KINDS.items() if isinstance(config, row.config)), None)
    if kind is None:
        raise ValueError(f"{type(config).__name__} is of no kind that can be saved: {', '.join(KINDS)}")
    return {
        "kind": kind,
        "version": VERSION,
        "config": asdict(config),
        "text_tokenizer": None if text_tokenizer is None else text_tokenizer.state(),
        "vae": vae,
        "training": dict(training or {}),
    }


def header(model: nn.Module, training: Mapping[str, Any] | None = None) -> Header:
    """The header of a model.

    Raises:
        ValueError: the model is of no known kind; names its class.
    """
    config: Any = getattr(model, "config", None)
    if not any(isinstance(config, row.config) for row in KINDS.values()):
        known = ", ".join(row.model.__name__ for row in KINDS.values())
        raise ValueError(f"{type(model).__name__} cannot be saved: not one of {known}")
    vae: Any = getattr(model, "vae", None)
    return make_header(
        config,
        text_tokenizer=getattr(model, "text_tokenizer", None),
        vae=None if vae is None else header(vae),
        training=training,
    )


def role(head: Header) -> str:
    """What the model of a header can stand for.

    Raises:
        ValueError: an unknown kind.
    """
    if head["kind"] not in KINDS:
        raise ValueError(f"kind {head['kind']!r} is not one of {', '.join(KINDS)}")
    return KINDS[head["kind"]].role


def build(head: Header) -> Any:
    """The model that a header describes, its parameters still on the meta device: see ``checkpoint.load_state``.

    Raises:
        ValueError: an unknown kind or setting, or a setting out of range; names it.
    """
    parts = {"vae": build(head["vae"])} if role(head) == "dalle" else {}
    _, model_class, config_class = KINDS[head["kind"]]
    if left := set(head["config"]) - {item.name for item in fields(config_class)}:
        raise ValueError(f"{config_class.__name__} has no {', '.join(sorted(left))}")
    with skeleton():
        model = model_class(config_class(**head["config"]), **parts)
    if head["text_tokenizer"] is not None:
        model.text_tokenizer = text_tokenizer_from_state(head["text_tokenizer"])
    return model


def describe_tokenizer(vae: nn.Module) -> dict[str, Any]:
    """What token shards say about the image tokenizer that they are of: kind, hashes, sizes; JSON can hold it.

    Raises:
        ValueError: an image tokenizer that cannot be saved, and so not be told from others.
    """
    head = header(vae)
    # a setting that came later, at its default, leaves the hash as it was: token shards of before stay valid
    settings = json.dumps(
        {name: value for name, value in head["config"].items() if (name, value) != ("strides", [])}, sort_keys=True
    )
    sizes = {name: getattr(vae, name) for name in ("codebook_size", "grid_size", "image_size")}
    hashes = {"config_sha256": hashlib.sha256(settings.encode()).hexdigest(), "weights_sha256": weights_sha256(vae)}
    return {"kind": head["kind"], **hashes, **sizes}


def weights_sha256(net: nn.Module) -> str:
    """SHA-256 of names, types, shapes and numbers of a network's weights, whatever file they come from."""
    weights = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return weights.hexdigest()
