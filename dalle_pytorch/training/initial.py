"""Training on from the weights of a DALLE, with a new optimiser: ``train_dalle.py init=...``."""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING

from torch import nn

from dalle_pytorch.checkpoints.checkpoint import KINDS, Header, describe_tokenizer
from dalle_pytorch.checkpoints.loading import read_header
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.errors import ConfigError
from dalle_pytorch.generation.engine import AnyDALLE
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.dalle_bart import DALLEBartConfig
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.text import TextTokenizer
from dalle_pytorch.training.text import make_tokenizer

if TYPE_CHECKING:
    from dalle_pytorch.training.dalle import TrainDALLEConfig
    from dalle_pytorch.training.run import Run

FREE = ("attn_dropout", "ff_dropout", "dropout", "stable", "checkpoint_activations", "gradient_scaling",
        "loss_img_weight", "caption_dropout", "token_dropout", "z_loss", "contrast_weight",
        "contrast_scale")  # fmt: skip
"""Settings of a model that say how it is trained, not what its weights mean."""
NOT_INHERITED = ("contrast_weight",)
"""Those that a training on from there does not take over: it would double the cost, without its phrases."""
FILLED = ("text_vocab_size", "image_vocab_size", "grid_size", "bos_id")
"""Settings that come from the tokenizers."""
TOKENIZER = ("text.tokenizer", "text.path", "text.tokenizer_from", "text.vocab_size")
"""Settings that choose a text tokenizer."""
SECTIONS = {"dalle": "model", "dalle_bart": "bart"}
"""Where the settings of each kind stand."""


def asked_for(overrides: Sequence[str]) -> set[str]:
    """Settings that a command line gives, dotted; every one of the model where it names a model or an experiment."""
    names = {match[1] for item in overrides if (match := re.match(r"[+~]*([\w.]+)", item))}
    if names & {"model", "experiment"}:
        names |= {f"model.{item.name}" for item in fields(DALLEConfig)}
        names |= {f"bart.{item.name}" for item in fields(DALLEBartConfig)}
    return names


def check_network(network: str, overrides: Sequence[str], *, plan: bool) -> None:
    """Refuse an unknown network, settings of the one that is not trained, and, but for a plan, of the tokenizers.

    Raises:
        ConfigError: names the setting.
    """
    if network not in SECTIONS:
        raise ConfigError(f"network must be one of {', '.join(SECTIONS)}, got {network!r}")
    own = SECTIONS[network]
    other = "model" if own == "bart" else "bart"
    for item in overrides:
        if match := re.match(rf"[+~]*({other}\.\w+)", item):
            raise ConfigError(f"{match[1]} is no setting of this network, whose settings are {own}.*")
        if not plan and (match := re.match(rf"[+~]*({own}\.({'|'.join(FILLED)}))\b", item)):
            raise ConfigError(f"{match[1]} comes from the tokenizers (vae= and text.*, or init=): leave it out")


def check_can_encode(vae: ImageTokenizer, data: TextImageDataModule, origin: str) -> None:
    """Refuse to train on pictures that the image tokenizer cannot turn into tokens.

    Raises:
        ConfigError: it has no encoder, and the data are no token shards of it; names the mend.
    """
    if getattr(vae, "can_encode", True) or data.tokenizer == describe_tokenizer(vae):
        return
    what = "pictures" if data.tokenizer is None else "tokens of another image tokenizer"
    raise ConfigError(
        f"{origin} has an image tokenizer without encoder, as min-dalle's detoker.pt is, and the data are {what}: "
        "import the weights with the whole VQGAN (dalle-mini/vqgan_imagenet_f16_16384), python -m "
        "dalle_pytorch.importers min_dalle PATH vqgan=FOLDER --out FILE, and train with init=FILE; token shards must "
        "be of that VQGAN, too"
    )


def take_sizes(config: "TrainDALLEConfig", asked: Collection[str]) -> Header:
    """Make ``config.model`` or ``config.bart`` that of the checkpoint, but for what was asked for and may differ.

    Args:
        config: settings; changed.
        asked: settings of the command line, as ``asked_for`` gives them; the rest are defaults.

    Returns:
        Header of the checkpoint.

    Raises:
        ConfigError: a setting that contradicts the checkpoint; names both values.
        ValueError: the checkpoint is of another kind.
    """
    assert config.init is not None  # only then there is something to take
    head = read_header(config.init, kind="dalle")
    if config.vae is not None:
        raise ConfigError(f"init={config.init} brings its image tokenizer: leave vae={config.vae} out")
    section = SECTIONS[head["kind"]]
    if head["kind"] != config.network and config.network != "dalle":
        raise ConfigError(f"init={config.init} is a DALLE, not a DALL·E mini: leave model=dalle_mini out")
    config.network = head["kind"]
    start, wanted = KINDS[head["kind"]].config(**head["config"]), asdict(getattr(config, section))
    names = {name.removeprefix(f"{section}.") for name in asked if name.startswith(f"{section}.")} - set(FILLED)
    for name in sorted(names & (wanted.keys() - set(FREE))):
        if wanted[name] != (has := getattr(start, name)):
            raise ConfigError(
                f"init={config.init} has {section}.{name}={has}, {section}.{name}={wanted[name]} contradicts it: "
                "leave it out"
            )
    if head["text_tokenizer"] is not None and (chosen := sorted(set(TOKENIZER) & set(asked))):
        raise ConfigError(f"init={config.init} brings its text tokenizer: leave {', '.join(chosen)} out")
    taken = {name for name in (*names, *NOT_INHERITED) if name in FREE and name in wanted}
    setattr(config, section, replace(start, **{name: wanted[name] for name in taken}))
    return head


def tokenizer_of(source: AnyDALLE, config: "TrainDALLEConfig", data: TextImageDataModule, run: "Run") -> TextTokenizer:
    """The text tokenizer of the model to start from, or the one that the settings name.

    Raises:
        ConfigError: it carries none, and the settings name none or one with more ids than it knows.
    """
    tokenizer, known = source.text_tokenizer, source.config.text_vocab_size
    if tokenizer is None:
        if config.text.tokenizer == "bpe" and config.text.tokenizer_from is None:
            raise ConfigError(
                f"init={config.init} carries no text tokenizer, and a new BPE would have other ids: name the one that "
                "it was trained with (text.tokenizer=clip, hf or hf_dir, or text.tokenizer_from=)"
            )
        tokenizer = make_tokenizer(config.text, data, run)
    if tokenizer.vocab_size > known:
        raise ConfigError(f"init={config.init} knows {known} text ids, its tokenizer would have {tokenizer.vocab_size}")
    return tokenizer


def fill(net: nn.Module, source: nn.Module) -> None:
    """Copy the weights of a model into one that is trained in another way; gradient scales begin anew."""
    weights = {name: tensor for name, tensor in source.state_dict().items() if not _is_scale(name)}
    fresh = {name: tensor for name, tensor in net.state_dict().items() if _is_scale(name)}
    net.load_state_dict({**weights, **fresh})


def _is_scale(name: str) -> bool:
    """Whether a tensor is part of a GradientScale."""
    return name.endswith(("_scale.exponent", "_scale.wait"))
