"""CLIP and SigLIP (1, and 2 with a fixed picture size) as transformers keeps them.

Format: a folder with ``config.json`` (model_type clip or siglip), weights in ``model.safetensors``, in shards that
``model.safetensors.index.json`` lists, or in ``pytorch_model.bin``; ``preprocessor_config.json`` (or
``processor_config.json``); and the vocabulary as ``tokenizer.json``, or CLIP's own as ``vocab.json``.

Sources: github.com/huggingface/transformers 5, models/{clip,siglip}/{modeling,configuration,image_processing}_*.py and
models/siglip*/tokenization_*.py.
"""

from pathlib import Path
from typing import Any

from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers.clip_text import openai_tokenizer, read_tokenizer, special
from dalle_pytorch.checkpoints.importers.clip_weights import block_rows, finish, make_config, sizes
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import read, state_dict
from dalle_pytorch.errors import UserError, refuse
from dalle_pytorch.files import read_json
from dalle_pytorch.models.pretrained_clip import OPENAI_MEAN, OPENAI_STD
from dalle_pytorch.text import TextTokenizer

FILES = ("config.json", "*processor_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

ENDS = r"(weight|bias)"
BLOCK = {
    r"self_attn\.out_proj\.": "out",
    r"layer_norm1\.": "norm1",
    r"layer_norm2\.": "norm2",
    r"mlp\.fc1\.": "up",
    r"mlp\.fc2\.": "down",
}
TABLE: Table = {
    r"(?:text|vision)_model\.embeddings\.position_ids": None,  # 0, 1, 2 ...
    r"text_model\.embeddings\.token_embedding\.weight": "text.tokens.weight",
    r"text_model\.embeddings\.position_embedding\.weight": "text.positions",
    r"text_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)": r"text.blocks.\1.qkv.\3.\2",
    **block_rows(r"text_model\.encoder\.layers\.(\d+)\.", "text", BLOCK),
    rf"text_model\.final_layer_norm\.{ENDS}": r"text.norm.\1",
    rf"(?:text_projection|text_model\.head)\.{ENDS}": r"text.proj.\1",
    r"vision_model\.embeddings\.class_embedding": "image.class_token",
    rf"vision_model\.embeddings\.patch_embedding\.{ENDS}": r"image.patches.\1",
    r"vision_model\.embeddings\.position_embedding\.weight": "image.positions",
    rf"vision_model\.pre_layrnorm\.{ENDS}": r"image.norm_pre.\1",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)": r"image.blocks.\1.qkv.\3.\2",
    **block_rows(r"vision_model\.encoder\.layers\.(\d+)\.", "image", BLOCK),
    rf"vision_model\.post_layernorm\.{ENDS}": r"image.norm_post.\1",
    r"visual_projection\.weight": "image.proj.weight",
    r"vision_model\.head\.probe": "image.pool.query",
    rf"vision_model\.head\.attention\.in_proj_{ENDS}": r"image.pool.qkv.\1",
    rf"vision_model\.head\.attention\.out_proj\.{ENDS}": r"image.pool.out.\1",
    rf"vision_model\.head\.layernorm\.{ENDS}": r"image.pool.norm.\1",
    rf"vision_model\.head\.mlp\.fc1\.{ENDS}": r"image.pool.up.\1",
    rf"vision_model\.head\.mlp\.fc2\.{ENDS}": r"image.pool.down.\1",
    r"logit_scale": "log_logit_scale",
    r"logit_bias": "logit_bias",
}

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
SIZES = {
    "hidden_size": "{}_width",
    "num_hidden_layers": "{}_depth",
    "intermediate_size": "{}_hidden",
    "num_attention_heads": "{}_heads",
    "layer_norm_eps": "{}_eps",
    "hidden_act": "{}_activation",
    "vocab_size": "text_vocab_size",
    "max_position_embeddings": "context_len",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
"""Settings of a tower, and our fields."""
HABITS: dict[str, dict[str, Any]] = {
    "clip": {"num_attention_heads": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"},
    "siglip": {"num_attention_heads": 12, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"},
}
"""The configuration classes' defaults of what no shape tells, by model_type."""
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("clip", "text"): {**HABITS["clip"], "num_attention_heads": 8},
    ("clip", "image"): {**HABITS["clip"], "image_size": 224},
    ("siglip", "text"): HABITS["siglip"],
    ("siglip", "image"): {**HABITS["siglip"], "image_size": 224},
}
PIXELS: dict[str, dict[str, Any]] = {
    "clip": {
        "size": {"shortest_edge": 224},
        "do_center_crop": True,
        "image_mean": OPENAI_MEAN,
        "image_std": OPENAI_STD,
    },
    "siglip": {"size": {"height": 224, "width": 224}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
}
"""What an image processor does where its file is silent."""


def convert(path: Path) -> tuple[Header, State]:
    """A CLIP or SigLIP of transformers.

    Args:
        path: its folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another model, or files that do not fit each other; names file and culprit.
    """
    if not path.is_dir():
        refuse(path, "transformers keeps a CLIP in a folder with config.json: give the folder")
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind not in HABITS:
        refuse(path / "config.json", f"model_type {kind!r} is not supported, only {' and '.join(HABITS)}")
    state = read_weights(path)
    try:
        weights = finish(rename(state, TABLE))
        told = {**towers(config, kind), **pixels(path, kind)}
        if told.pop("input_size") != told["image_size"]:
            raise UserError(f"its image processor does not make pictures of image_size = {told['image_size']}")
        tokenizer, marks = text(path, kind, sizes(weights)["text_vocab_size"])
        return make_header(make_config(weights, {**told, **marks}), text_tokenizer=tokenizer), weights
    except ValueError as error:
        refuse(path, str(error))


def read_weights(folder: Path) -> State:
    """All weights of a folder, from one file or from shards.

    Raises:
        FileNotFoundError: there are none, or a shard is missing.
        ValueError: a file cannot be read, or lists one outside the folder.
    """
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")
    if not name.endswith(".index.json"):
        return state_dict(read(folder / name))
    state: State = {}
    shards = read_json(folder / name).get("weight_map")
    if not isinstance(shards, dict):
        refuse(folder / name, "it has no weight_map")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            refuse(folder / name, f"lists {shard}, which is not a file of this folder")
        state.update(state_dict(read(folder / shard)))
    return state


def towers(config: dict[str, Any], kind: str) -> dict[str, Any]:
    """Our fields of both towers, as far as ``config.json`` tells them.

    Raises:
        ValueError: a setting that is not supported; names it.
    """
    told: dict[str, Any] = {}
    for name, key in (("text", "text_config"), ("image", "vision_config")):
        # CLIPConfig lets the old text_config_dict win over text_config
        settings = {**DEFAULTS[kind, name], **(config.get(key) or {}), **(config.get(f"{key}_dict") or {})}
        if settings["hidden_act"] not in ACTIVATIONS:
            raise UserError(f"{key}: hidden_act {settings['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
        settings["hidden_act"] = ACTIVATIONS[settings["hidden_act"]]
        for setting, field in SIZES.items():
            if setting in settings:
                value = settings[setting]
                told[field.format(name)] = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
    if kind == "siglip":
        told |= {"text_causal": False, "text_pool": "last"}
    return told


def pixels(folder: Path, kind: str) -> dict[str, Any]:
    """Our fields of what the image processor does; and input_size, the side of the pictures it makes.

    Raises:
        FileNotFoundError: the folder does not say.
        ValueError: it does something that is not supported; names it.
    """
    file = next((folder / name for name in ("preprocessor_config.json", "processor_config.json")
                 if (folder / name).is_file()), folder / "preprocessor_config.json")  # fmt: skip
    content = read_json(file)
    settings = {**PIXELS[kind], **content.get("image_processor", content)}
    size, resample = settings["size"], settings.get("resample", 3)
    side, resize = _size(size)
    crop = _size(settings["crop_size"])[0] if settings.get("do_center_crop") and "crop_size" in settings else side
    scale = settings.get("rescale_factor", 1 / 255)
    wrong = {
        "do_resize": not settings.get("do_resize", True),
        "do_rescale": not settings.get("do_rescale", True) or abs(scale * 255 - 1) > 1e-3,
        "size": side is None or crop != side or (resize == "crop" and not settings.get("do_center_crop")),
        "resample": resample not in RESAMPLE,
    }
    if any(wrong.values()):
        names = ", ".join(f"{name}={settings.get(name)}" for name, bad in wrong.items() if bad)
        raise UserError(f"{file.name}: {names} is not supported")
    normalise = settings.get("do_normalize", True)
    return {
        "input_size": side,
        "resize": resize,
        "interpolation": RESAMPLE[resample],
        "mean": list(settings["image_mean"]) if normalise else [0.0] * 3,
        "std": list(settings["image_std"]) if normalise else [1.0] * 3,
    }


def _size(size: Any) -> tuple[int | None, str]:
    """Side of the square, and how pictures come to it."""
    if isinstance(size, int):
        return size, "crop"
    if isinstance(size, dict) and "shortest_edge" in size:
        return size["shortest_edge"], "crop"
    if isinstance(size, dict) and size.get("height") == size.get("width"):
        return size.get("height"), "squash"
    return None, "crop"


def text(folder: Path, kind: str, vocab_size: int) -> tuple[TextTokenizer, dict[str, Any]]:
    """The text tokenizer, and our fields of its marks.

    Raises:
        ValueError: the folder has none that is supported.
    """
    if kind == "clip":
        tokenizer = openai_tokenizer(folder, vocab_size)
        if tokenizer is not None:
            return tokenizer, {"start_id": tokenizer.vocab_size - 2, "end_id": tokenizer.vocab_size - 1}
        return read_tokenizer(folder, "whitespace", vocab_size)
    # SigLIP 2 has Gemma's vocabulary and keeps punctuation: Siglip2Tokenizer
    clean = "lower" if special(folder, "eos_token") == "<eos>" else "siglip"
    found, marks = read_tokenizer(folder, clean, vocab_size)
    return found, {**marks, "start_id": None}
