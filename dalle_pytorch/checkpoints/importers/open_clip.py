"""CLIPs and SigLIPs of open_clip.

Format: a folder with ``open_clip_config.json`` and weights, or one file of weights (a training's checkpoint too, whose
weights are under ``state_dict``) with such a config beside. Layers have OpenAI's names; a text tower of its own has
them under ``text.``, and SigLIP's image tower has timm's under ``visual.trunk.``.

Sources: github.com/mlfoundations/open_clip, src/open_clip/{model,transformer,factory,transform,tokenizer}.py;
github.com/huggingface/pytorch-image-models, timm/models/vision_transformer.py and timm/layers/attention_pool.py.
"""

import re
from pathlib import Path
from typing import Any

from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers import openai_clip
from dalle_pytorch.checkpoints.importers.clip_text import read_tokenizer
from dalle_pytorch.checkpoints.importers.clip_weights import block_rows, finish, make_config, sizes
from dalle_pytorch.checkpoints.importers.openai_clip import ENDS
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import read, weights_of
from dalle_pytorch.errors import UserError, refuse
from dalle_pytorch.files import read_json
from dalle_pytorch.models.pretrained_clip import INTERPOLATIONS, OPENAI_MEAN, OPENAI_STD
from dalle_pytorch.text import CLIPTokenizer, TextTokenizer
from dalle_pytorch.text.cleaned import CLEANINGS

FILES = ("open_clip_config.json",)
SIGNATURE = frozenset({"text.token_embedding.weight", "text.positional_embedding", "logit_scale"})
WEIGHTS = (  # in the order of open_clip/factory.py, `_find_checkpoint_in_dir`
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
    *("open_clip_pytorch_model.pth", "open_clip_pytorch_model.pt", "model.safetensors", "pytorch_model.bin"),
)

TEXT_TABLE: Table = {
    **{rf"(?:text\.)?{source}": target for source, target in openai_clip.TEXT_TABLE.items()},
    rf"(?:text\.)?text_projection\.{ENDS}": r"text.proj.\1",
    r"logit_bias": "logit_bias",
}
TIMM_TABLE: Table = {
    rf"visual\.trunk\.patch_embed\.proj\.{ENDS}": r"image.patches.\1",
    r"visual\.trunk\.pos_embed": "image.positions",
    **block_rows(
        r"visual\.trunk\.blocks\.(\d+)\.",
        "image",
        {
            r"attn\.qkv\.": "qkv",
            r"attn\.proj\.": "out",
            r"norm1\.": "norm1",
            r"norm2\.": "norm2",
            r"mlp\.fc1\.": "up",
            r"mlp\.fc2\.": "down",
        },
    ),
    rf"visual\.trunk\.norm\.{ENDS}": r"image.norm_post.\1",
    r"visual\.trunk\.attn_pool\.latent": "image.pool.query",
    rf"visual\.trunk\.attn_pool\.(q|kv)\.{ENDS}": r"image.pool.qkv.\2.\1",
    rf"visual\.trunk\.attn_pool\.proj\.{ENDS}": r"image.pool.out.\1",
    rf"visual\.trunk\.attn_pool\.norm\.{ENDS}": r"image.pool.norm.\1",
    rf"visual\.trunk\.attn_pool\.mlp\.fc1\.{ENDS}": r"image.pool.up.\1",
    rf"visual\.trunk\.attn_pool\.mlp\.fc2\.{ENDS}": r"image.pool.down.\1",
}

READ: dict[str, frozenset[str]] = {
    "model_cfg": frozenset({"embed_dim", "quick_gelu", "custom_text", "vision_cfg", "text_cfg", "init_logit_scale",
                            "init_logit_bias", "nonscalar_logit_scale"}),
    "vision_cfg": frozenset({"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "act_kwargs",
                             "norm_kwargs", "pos_embed_type", "patch_dropout", "attn_pooler_queries",
                             "attn_pooler_heads", "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj",
                             "timm_drop", "timm_drop_path", "in_chans"}),
    "text_cfg": frozenset({"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "no_causal_mask",
                           "pool_type", "proj_bias", "act_kwargs", "norm_kwargs", "hf_tokenizer_name",
                           "tokenizer_kwargs", "pad_id", "bos_id", "eos_id"}),
}  # fmt: skip
"""Settings that are read here, or that a finished model does not need; any other must be off."""
NEUTRAL = (("vision_cfg", "pool_type", "tok"), ("text_cfg", "text_arch", "clip"), ("text_cfg", "proj_type", "linear"))
POOLS = {"argmax": "end", "eos": "end", "last": "last"}
RESIZES = {"shortest": "crop", "squash": "squash"}
TIMM_NAME = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip_(\d+)")
TIMM_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
TIMM_TANH = ("base_patch32", "large_patch16_siglip_512", "so400m_patch16", "giantopt")
"""Of these timm computes GELU by tanh, of the others exactly."""


def convert(path: Path, *, config: str | Path | None = None) -> tuple[Header, State]:
    """A CLIP or SigLIP of open_clip.

    Args:
        path: its folder, or a file of weights.
        config: ``open_clip_config.json``, or one of open_clip's model_configs/, with its tokenizer.json beside where
            the model has one of its own; None = the folder's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not such files, or a setting that is not supported; names file and culprit.
    """
    if config is None and not path.is_dir():
        refuse(path, "weights alone do not tell the activation: give config=, open_clip_config.json or a model config")
    file = path / FILES[0] if config is None else Path(config)
    content = read_json(file)
    model = content.get("model_cfg", content)
    state = read_weights(path)
    try:
        check(model)
        timm = model["vision_cfg"].get("timm_model_name")
        names = TIMM_TABLE if timm else openai_clip.RESNET_TABLE if _is_resnet(state) else openai_clip.TRANSFORMER_TABLE
        renamed = finish(rename(state, {**TEXT_TABLE, **names}))
        vocab_size = sizes(renamed)["text_vocab_size"]
        tokenizer, marks = text(model["text_cfg"], file.parent, vocab_size)
        told = {**image_fields(model), **text_fields(model), **pixels(content, model), **marks}
        return make_header(make_config(renamed, told), text_tokenizer=tokenizer), renamed
    except ValueError as error:
        refuse(path, str(error))


def read_weights(path: Path) -> State:
    """Weights of a folder or a file, without what surrounds them in a checkpoint of a training.

    Raises:
        FileNotFoundError: none there.
        ValueError: a file that cannot be read, or that open_clip would not have written.
    """
    if path.is_dir():
        name = next((name for name in WEIGHTS if (path / name).is_file()), None)
        if name is None:
            raise FileNotFoundError(f"{path} has no weights: none of {', '.join(WEIGHTS)}")
        path = path / name
    state = weights_of(read(path))
    if state and all(key.startswith("module.") for key in state):  # DistributedDataParallel
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if "logit_scale" not in state or not any(key.startswith("visual.") for key in state):
        refuse(path, "not a CLIP of open_clip")
    return state


def check(model: dict[str, Any]) -> None:
    """Refuse what our towers do not have.

    Raises:
        ValueError: names the setting.
    """
    for section, read_here in READ.items():
        settings = model if section == "model_cfg" else model.get(section)
        if not isinstance(settings, dict):
            raise UserError(f"the config has no {section}")
        for name, value in settings.items():
            if value and name not in read_here and (section, name, value) not in NEUTRAL:
                raise UserError(f"{section}: {name}={value!r} is not supported")
    if not isinstance(model.get("embed_dim"), int):
        raise UserError("the config has no embed_dim")
    timm = model["vision_cfg"].get("timm_model_name")
    if timm and (not TIMM_NAME.fullmatch(timm) or model["vision_cfg"].get("timm_pool") != "map"):
        raise UserError(f"image tower {timm!r} of timm is not supported, only those of SigLIP with timm_pool='map'")
    pool = model["text_cfg"].get("pool_type", "argmax")
    if pool not in POOLS:
        raise UserError(f"text_cfg: pool_type={pool!r} is not one of {', '.join(POOLS)}")


def image_fields(model: dict[str, Any]) -> dict[str, Any]:
    """Our fields of the image tower, as far as the config tells them."""
    vision = model["vision_cfg"]
    told: dict[str, Any] = {"embed_dim": model["embed_dim"], "image_size": square(vision.get("image_size", 224))}
    if match := TIMM_NAME.fullmatch(vision.get("timm_model_name") or ""):
        tanh = any(name in match[0] for name in TIMM_TANH)
        told |= {"patch_size": int(match[2]), "image_heads": TIMM_HEADS[match[1]]}
        return told | {"image_activation": "gelu_tanh" if tanh else "gelu", "image_eps": 1e-6}  # timm's LayerNorm
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    if isinstance(layers, list):
        told |= {"image_stages": layers, "image_heads": width * 32 // vision.get("head_width", 64)}
    else:
        told |= {"image_depth": layers, "patch_size": square(vision.get("patch_size", 16))}
        told |= {"image_heads": width // vision.get("head_width", 64), **habits(model, "vision_cfg", "image")}
    return told | {"image_width": width}


def text_fields(model: dict[str, Any]) -> dict[str, Any]:
    """Our fields of the text tower, as far as the config tells them."""
    text_cfg = model["text_cfg"]
    return {
        "context_len": text_cfg.get("context_length", 77),
        "text_width": text_cfg.get("width", 512),
        "text_depth": text_cfg.get("layers", 12),
        "text_heads": text_cfg.get("heads", 8),
        "text_causal": not text_cfg.get("no_causal_mask", False),
        "text_pool": POOLS[text_cfg.get("pool_type", "argmax")],
        **habits(model, "text_cfg", "text"),
    }


def habits(model: dict[str, Any], section: str, tower: str) -> dict[str, Any]:
    """Activation and epsilon of a tower.

    Raises:
        ValueError: an activation with other settings than tanh.
    """
    settings = model[section]
    kwargs = settings.get("act_kwargs") or {}
    if kwargs not in ({}, {"approximate": "none"}, {"approximate": "tanh"}):
        raise UserError(f"{section}: act_kwargs={kwargs} is not supported")
    exact = "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"
    return {
        f"{tower}_activation": "quick_gelu" if model.get("quick_gelu") else exact,
        f"{tower}_eps": float((settings.get("norm_kwargs") or {}).get("eps", 1e-5)),
    }


def pixels(content: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Our fields of what is done to pictures; what is not said is as for OpenAI's models, which is open_clip's rule.

    Raises:
        ValueError: something that is not supported, or SigLIP's is not said; names it.
    """
    settings = content.get("preprocess_cfg")
    if settings is None and model["vision_cfg"].get("timm_model_name"):
        raise UserError("the config has no preprocess_cfg, without which SigLIP's pictures are not known")
    settings = {name: value for name, value in (settings or {}).items() if value is not None}
    image_size = square(model["vision_cfg"].get("image_size", 224))
    size, mode = square(settings.get("size", image_size)), settings.get("resize_mode", "shortest")
    interpolation = settings.get("interpolation", "bicubic")
    if size != image_size or mode not in RESIZES or interpolation not in INTERPOLATIONS:
        raise UserError(f"preprocess_cfg: size={size}, resize_mode={mode}, interpolation={interpolation} not supported")
    return {
        "resize": RESIZES[mode],
        "interpolation": interpolation,
        "mean": list(settings.get("mean", OPENAI_MEAN)),
        "std": list(settings.get("std", OPENAI_STD)),
    }


def text(text_cfg: dict[str, Any], folder: Path, vocab_size: int) -> tuple[TextTokenizer | None, dict[str, Any]]:
    """The text tokenizer, and our fields of its marks; none where CLIP's has another size than the model.

    Raises:
        ValueError: it is not supported or not there.
    """
    kwargs = dict(text_cfg.get("tokenizer_kwargs") or {})
    own = bool(text_cfg.get("hf_tokenizer_name"))
    clean = kwargs.pop("clean", "whitespace" if own else "lower")
    if any(kwargs.values()) or clean not in CLEANINGS or (not own and clean != "lower"):
        raise UserError(f"text_cfg: tokenizer_kwargs={text_cfg['tokenizer_kwargs']} is not supported")
    pool = text_cfg.get("pool_type", "argmax")
    if own:
        tokenizer, marks = read_tokenizer(folder, clean, vocab_size)
        if pool == "argmax" or (pool == "eos" and text_cfg.get("eos_id") != marks["end_id"]):
            raise UserError(f"text_cfg: pool_type={pool!r} does not go with a tokenizer that ends in {marks['end_id']}")
        return tokenizer, marks
    clip = CLIPTokenizer()
    marks = {"start_id": vocab_size - 2, "end_id": vocab_size - 1}
    return clip if vocab_size == clip.vocab_size else None, marks


def square(size: Any) -> int:
    """The side of a size that may be given as two equal ones.

    Raises:
        ValueError: it is no square.
    """
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise UserError(f"only square pictures and patches are supported, got {size}")
    return size


def _is_resnet(state: State) -> bool:
    return "visual.attnpool.positional_embedding" in state
