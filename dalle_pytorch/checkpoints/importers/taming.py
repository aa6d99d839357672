"""VQGANs of taming-transformers, and of those who kept its layout: DALL·E mini, min-dalle, minDALL-E, DALLE-pytorch.

Formats: a Lightning checkpoint with the weights under ``state_dict``, or the weights alone. ``VQModel`` keeps its codes
in ``quantize.embedding``, ``GumbelVQ`` in ``quantize.embed`` with logits of ``quantize.proj``. min-dalle's
``detoker.pt`` is the decoder of the former with ``embedding`` for the codes. All sizes are read from the shapes.

Sources: CompVis/taming-transformers, taming/models/vqgan.py and taming/modules/diffusionmodules/model.py;
kuprel/min-dalle 0.4.11, min_dalle/models/vqgan_detokenizer.py.
"""

import math
import re
from pathlib import Path
from typing import Any

from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import read, weights_of
from dalle_pytorch.errors import UserError, first_line, refuse
from dalle_pytorch.models.vqgan import VQGANConfig

SIGNATURE = frozenset({"quantize.embedding.weight", "encoder.down.0.block.0.norm1.weight", "quant_conv.weight"})
GUMBEL_SIGNATURE = frozenset({"quantize.embed.weight", "quantize.proj.weight", "encoder.down.0.block.0.norm1.weight"})
DETOKER_SIGNATURE = frozenset({"embedding.weight", "post_quant_conv.weight", "decoder.up.0.block.0.norm1.weight"})

CONV = r"\.(?:weight|bias)"
BLOCK = rf"(?:(?:norm|conv)[12]|nin_shortcut){CONV}"
ATTENTION = rf"(?:norm|q|k|v|proj_out){CONV}"
TABLE: Table = {
    rf"((?:encoder|decoder)\.(?:conv_in|norm_out|conv_out){CONV})": r"\1",
    rf"((?:encoder|decoder)\.mid\.(?:block_[12]\.{BLOCK}|attn_1\.{ATTENTION}))": r"\1",
    rf"((?:encoder\.down|decoder\.up)\.\d+\.(?:block\.\d+\.{BLOCK}|attn\.\d+\.{ATTENTION}))": r"\1",
    rf"(encoder\.down\.\d+\.downsample\.conv{CONV})": r"\1",
    rf"(decoder\.up\.\d+\.upsample\.conv{CONV})": r"\1",
    rf"((?:post_)?quant_conv{CONV})": r"\1",
    r"quantize\.embed(?:ding)?\.weight": "codebook.weight",
    rf"quantize\.proj({CONV})": r"code_logits\1",
    r"loss\..+": None,  # the discriminator and LPIPS, which only training needs
}
DETOKER_TABLE: Table = {
    r"embedding\.weight": "quantize.embedding.weight",
    r"((?:decoder|post_quant_conv)\..+)": r"\1",
}

UNSUPPORTED = {
    r"quantize\.used": "maps its codes to a subset (quantize.used): tokenizers with `remap` cannot be imported",
    r"quantize\.embedding\.(cluster_size|embed_avg)": "is an EMAVQ (codes as moving averages): only VQModel and "
    "GumbelVQ can be imported",
    r"(model_)?ema[._].*": "holds moving averages of the weights beside them: save the weights alone",
    r"colorize": "is a tokenizer of label maps (it has `colorize`), not of pictures",
}


def convert(
    path: Path,
    *,
    config: Path | None = None,
    pixel_range: str = "minus_one_to_one",
    norm_eps: float = 1e-6,
    image_size: int | None = None,
) -> tuple[Header, State]:
    """A VQModel or GumbelVQ of taming-transformers.

    Args:
        path: the checkpoint.
        config: its yaml, of a VQGAN or of a transformer that names one as first stage; compared with the weights.
        pixel_range: pixels that it was trained on; "zero_to_one" for those of DALL·E mini.
        norm_eps: of GroupNorm, which no file tells; taming's is 1e-6.
        image_size: side of the picture, pixels; None = the yaml's resolution, or 256.

    Raises:
        ValueError: not such a file, a kind that is not supported, or weights and yaml differ; names file and culprit.
    """
    state = read_state(path)
    if not (state.keys() >= SIGNATURE or state.keys() >= GUMBEL_SIGNATURE):
        hint = "; it looks like min-dalle's decoder (detoker.pt)" if state.keys() >= DETOKER_SIGNATURE else ""
        refuse(path, f"not a VQGAN of taming-transformers{hint}")
    model = None if config is None else read_yaml(config)
    if image_size is None:
        image_size = 256 if model is None else model["params"]["ddconfig"]["resolution"]
    try:
        vqgan, weights = vqgan_from_state(state, pixel_range=pixel_range, norm_eps=norm_eps, image_size=image_size)
    except ValueError as error:
        refuse(path, str(error))
    if config is not None and model is not None:
        compare(path, vqgan, config, model)
    return make_header(vqgan), weights


def convert_detoker(path: Path, *, norm_eps: float = 1e-6) -> tuple[Header, State]:
    """The decoder of min-dalle, ``detoker.pt``: DALL·E mini's VQGAN without its encoder, for pictures of 256 pixels.

    Args:
        path: the file.
        norm_eps: of GroupNorm. The VQGAN was trained with 1e-6; min-dalle decodes with 1e-5, slightly other pixels.

    Raises:
        ValueError: not such a file; names file and culprit.
    """
    state = read_state(path)
    if not state.keys() >= DETOKER_SIGNATURE:
        hint = "; it looks like a whole VQGAN of taming-transformers" if state.keys() >= SIGNATURE else ""
        refuse(path, f"not min-dalle's decoder (detoker.pt){hint}")
    try:
        state = rename(state, DETOKER_TABLE)
        vqgan, weights = vqgan_from_state(state, pixel_range="zero_to_one", norm_eps=norm_eps, image_size=256)
    except ValueError as error:
        refuse(path, str(error))
    return make_header(vqgan), weights


def read_state(path: Path) -> State:
    """The weights of a Lightning checkpoint, or of a file that has nothing else."""
    return weights_of(read(path))


def vqgan_from_state(
    state: State, *, pixel_range: str, norm_eps: float, image_size: int, normalize_codes: bool = False
) -> tuple[VQGANConfig, State]:
    """Sizes and weights of a VQGAN from weights under taming's names, without a prefix.

    Args:
        state: the weights; without an encoder it becomes a decoder alone.
        pixel_range: "minus_one_to_one" or "zero_to_one", the pixels that it was trained on.
        norm_eps: of GroupNorm.
        image_size: side of the picture, pixels.
        normalize_codes: codes of length 1 (LlamaGen).

    Raises:
        ValueError: a weight is missing, left over or of a kind that is not supported; names it.
    """
    for pattern, reason in UNSUPPORTED.items():
        if any(re.fullmatch(pattern, key) for key in state):
            raise UserError(reason)
    weights = rename(state, TABLE)
    encoder = any(key.startswith(("encoder.", "quant_conv.")) for key in weights)
    levels = 1 + max(numbers(weights, r"decoder\.up\.(\d+)\..+"), default=0)
    widths = [shape(weights, f"decoder.up.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    ch = shape(weights, "encoder.conv_in.weight")[0] if encoder else math.gcd(*widths)
    if any(width % ch for width in widths):
        raise UserError(f"level widths {widths} are no multiples of the {ch} channels of encoder.conv_in")
    channels, z_channels = shape(weights, "decoder.conv_out.weight")[0], shape(weights, "decoder.conv_in.weight")[1]
    if encoder:
        check_ends(weights, channels, z_channels)
    codebook_size, embed_dim = shape(weights, "codebook.weight", ndim=2)
    config = VQGANConfig(
        image_size=image_size,
        channels=channels,
        ch=ch,
        ch_mult=[width // ch for width in widths],
        num_res_blocks=max(numbers(weights, r"decoder\.up\.0\.block\.(\d+)\..+")),  # from 0; the decoder has one more
        attention_levels=sorted(numbers(weights, r"decoder\.up\.(\d+)\.attn\..+")),
        z_channels=z_channels,
        embed_dim=embed_dim,
        codebook_size=codebook_size,
        quantizer="gumbel" if "quantize.embed.weight" in state else "vq",
        normalize_codes=normalize_codes,
        pixel_range=pixel_range,
        norm_eps=norm_eps,
        encoder=encoder,
    )
    return config, weights


def check_ends(weights: State, channels: int, z_channels: int) -> None:
    """Refuse an encoder that reads other pictures than the decoder gives, or latents with a variance.

    Raises:
        ValueError: names the channels of both.
    """
    inputs, outputs = shape(weights, "encoder.conv_in.weight")[1], shape(weights, "encoder.conv_out.weight")[0]
    if inputs != channels:
        raise UserError(f"the encoder reads {inputs} picture channels, the decoder gives {channels}; they must agree")
    if outputs != z_channels:
        raise UserError(
            f"the encoder gives {outputs} channels (double_z?), the decoder reads {z_channels}: not a VQGAN"
        )


def shape(weights: State, key: str, ndim: int = 4) -> tuple[int, ...]:
    """Shape of a weight, by default of a convolution: outputs, inputs, height, width.

    Raises:
        ValueError: it is missing, or has another number of axes; names it.
    """
    if key not in weights:
        raise UserError(f"weights do not fit: missing {key}")
    if weights[key].ndim != ndim:
        raise UserError(f"weights do not fit: {key} has {weights[key].ndim} axes, not {ndim}")
    return tuple(weights[key].shape)


def numbers(weights: State, pattern: str) -> set[int]:
    """Numbers that stand in the keys of a pattern."""
    return {int(match[1]) for key in weights if (match := re.fullmatch(pattern, key))}


def read_yaml(path: Path) -> dict[str, Any]:
    """Target and parameters of the VQGAN that a yaml of taming-transformers describes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no yaml, or it describes none; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (config=)")
    import yaml  # comes with Hydra; nothing else here needs it

    try:
        model = yaml.safe_load(path.read_text())["model"]
        model = model["params"].get("first_stage_config", model)  # a transformer names its tokenizer so
        if not isinstance(model["params"]["ddconfig"]["resolution"], int) or not isinstance(model["target"], str):
            raise TypeError("resolution must be a number, target a name")
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        refuse(path, f"no config of a VQGAN, which has model.target and model.params.ddconfig ({first_line(error)})")
    return model


def compare(path: Path, vqgan: VQGANConfig, config: Path, model: dict[str, Any]) -> None:
    """Refuse a yaml that is not of these weights.

    Raises:
        ValueError: a size differs, or is not in the yaml; names both files and sizes.
    """
    params, net = model["params"], model["params"]["ddconfig"]
    found = {
        **{name: getattr(vqgan, name) for name in ("ch", "ch_mult", "num_res_blocks", "z_channels", "embed_dim")},
        "in_channels": vqgan.channels,
        "out_ch": vqgan.channels,
        "n_embed": vqgan.codebook_size,
        "attn_resolutions": vqgan.attention_levels,
        "target": vqgan.quantizer,
    }
    for name, size in found.items():
        said = {**params, **net, "target": "gumbel" if "Gumbel" in model["target"] else "vq"}.get(name)
        if name == "attn_resolutions":
            said = [level for level in range(len(vqgan.ch_mult)) if net["resolution"] >> level in (said or ())]
        if said != size:
            raise UserError(f"{config} is not the config of {path}: it says {name} {said}, the weights have {size}")
