"""The network of a DALLE training: new, or on from the weights of another one (``init=``)."""

from collections.abc import Set
from dataclasses import asdict, fields, replace

from dalle_pytorch.checkpoints.checkpoint import Header, config_of, describe_tokenizer, token_differences
from dalle_pytorch.checkpoints.loading import read_header
from dalle_pytorch.data.datamodule import TextImageDataModule
from dalle_pytorch.errors import ConfigError
from dalle_pytorch.models.image_tokenizer import ImageTokenizer
from dalle_pytorch.models.text_to_image import TextToImage, TextToImageConfig
from dalle_pytorch.text import TextTokenizer
from dalle_pytorch.training.dalle import TrainDALLEConfig
from dalle_pytorch.training.resume import differences
from dalle_pytorch.training.text import make_tokenizer

HOW_TO_TRAIN = ("attn_dropout", "ff_dropout", "dropout", "stable", "checkpoint_activations", "gradient_scaling",
                "loss_img_weight", "caption_dropout", "token_dropout", "z_loss", "contrast_weight",
                "contrast_scale")  # fmt: skip
"""Settings of a model that say how it is trained, not what its weights mean."""
NOT_INHERITED = ("contrast_weight",)
"""Those that a training from a checkpoint does not take over: it would double the cost, without its phrases."""
FILLED = ("text_vocab_size", "text_features", "image_vocab_size", "grid_size", "bos_id")
"""Settings that come from the tokenizers."""
TOKENIZER = ("text.tokenizer", "text.path", "text.tokenizer_from", "text.vocab_size")
"""Settings that choose a text tokenizer."""

OPTIONS = {"dalle": "base", "dalle_bart": "bart"}
"""The option of model= that has the settings of a kind of checkpoint."""


def check_filled(explicit: Set[str]) -> None:
    """Refuse settings that the tokenizers fill.

    Args:
        explicit: dotted names of the settings that the command line gives.

    Raises:
        ConfigError: names the setting.
    """
    if given := sorted(explicit & {f"model.{name}" for name in FILLED}):
        raise ConfigError(f"{given[0]} comes from the tokenizers (vae= and text.*, or init=): leave it out")


def check_can_encode(vae: ImageTokenizer, data: TextImageDataModule, origin: str) -> None:
    """Refuse to train on images that the image tokenizer cannot turn into tokens.

    Raises:
        ConfigError: it has no encoder, and the data are no token shards of it; names the correction.
    """
    known = data.tokenizer is not None and not token_differences(data.tokenizer, describe_tokenizer(vae))
    if getattr(vae, "can_encode", True) or known:
        return
    what = "pictures" if data.tokenizer is None else "tokens of another image tokenizer"
    raise ConfigError(
        f"{origin} has an image tokenizer without encoder, as min-dalle's detoker.pt is, and the data are {what}: "
        "import the weights with the whole VQGAN (dalle-mini/vqgan_imagenet_f16_16384), dalle-import-weights min_dalle "
        "PATH vqgan=FOLDER --out FILE, and train with init=FILE; token shards must be of that VQGAN, too"
    )


def inherit_config(config: TrainDALLEConfig, explicit: Set[str]) -> Header:
    """Make ``config.model`` that of the checkpoint ``config.init``, but for what was asked for and may differ.

    Args:
        config: settings; changed.
        explicit: dotted names of the settings and groups that the command line gives; the rest are defaults.

    Returns:
        Header of the checkpoint.

    Raises:
        ConfigError: a setting that contradicts the checkpoint; names both values.
        UserError: the checkpoint is of another kind.
    """
    assert config.init is not None  # only then there is something to inherit
    head = read_header(config.init, kind="dalle")
    if config.vae is not None:
        raise ConfigError(f"init={config.init} brings its image tokenizer: leave vae={config.vae} out")
    start, wanted = config_of(head), asdict(config.model)
    asked = {name.removeprefix("model.") for name in explicit if name.startswith("model.")}
    if explicit & {"model", "experiment"}:  # they bring settings of the model, too
        asked |= {name for name, *_ in differences(asdict(type(config.model)()), wanted)}
    asked -= set(FILLED)
    if asked and type(config.model) is not type(start):
        raise ConfigError(
            f"init={config.init} is a {head['kind']}, model.{min(asked)} is not its setting: leave it out, "
            f"or say model={OPTIONS[head['kind']]}, whose settings it has"
        )
    for name, has, given in differences(asdict(start), wanted):
        if name not in HOW_TO_TRAIN and asked & {name, name.partition(".")[0]}:
            raise ConfigError(
                f"init={config.init} has model.{name}={has}, model.{name}={given} contradicts it: leave it out"
            )
    if head["text_tokenizer"] is not None and (chosen := sorted(explicit & set(TOKENIZER))):
        raise ConfigError(f"init={config.init} brings its text tokenizer: leave {', '.join(chosen)} out")
    known = {item.name for item in fields(start)}
    changed = {name: wanted[name] for name in asked & set(HOW_TO_TRAIN)}
    off = {name: 0.0 for name in NOT_INHERITED if name in known and name not in asked}
    config.model = replace(start, **off, **changed)
    return head


def tokenizer_of(
    source: TextToImage, config: TrainDALLEConfig, data: TextImageDataModule, resumed: Header | None
) -> TextTokenizer:
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
        tokenizer = make_tokenizer(config.text, data, resumed)
    if tokenizer.vocab_size > known:
        raise ConfigError(f"init={config.init} knows {known} text ids, its tokenizer would have {tokenizer.vocab_size}")
    return tokenizer


def network_from(source: TextToImage, config: TextToImageConfig) -> TextToImage:
    """A network with the weights of another one, trained in another way; gradient scales begin anew."""
    net = config.build(source.vae, getattr(source, "text_encoder", None))
    weights = {name: tensor for name, tensor in source.state_dict().items() if not _is_scale(name)}
    fresh = {name: tensor for name, tensor in net.state_dict().items() if _is_scale(name)}
    net.load_state_dict({**weights, **fresh})
    return net


def _is_scale(name: str) -> bool:
    """Whether a tensor is part of a GradientScale."""
    return name.endswith(("_scale.exponent", "_scale.wait"))
