"""DALL·E mini and mega as they were trained: a folder of Flax weights, and another one of their VQGAN.

Formats: ``config.json``, ``flax_model.msgpack``, and ``tokenizer.json`` or ``vocab.json`` with ``merges.txt``. Layers
are stacked along a first axis (``FlaxBartEncoderLayers``) or apart (``FlaxBartEncoderLayer_0``); kernels are the
transposes of torch's weights. The VQGAN is ``flax_model.msgpack`` with a ``config.json``, or a torch file.

Sources: github.com/borisdayma/dalle-mini, src/dalle_mini/model/; github.com/patil-suraj/vqgan-jax, vqgan_jax/.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dalle_pytorch.checkpoints import flax_reader, hub
from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers.flax_vqgan import convert_vqgan, rename_parts
from dalle_pytorch.checkpoints.importers.torch_min_dalle import (
    assemble,
    check_vocabulary,
    make_tokenizer,
    read_vocabulary,
)
from dalle_pytorch.errors import refuse
from dalle_pytorch.files import read_json
from dalle_pytorch.text import BartTokenizer
from dalle_pytorch.text.bart import PACKAGES, read_words, require
from dalle_pytorch.text.bpe import read_merge

FILES = (("config.json", "flax_model.msgpack"),)

FIXED: dict[str, tuple[Any, Any]] = {
    "activation_function": ("gelu", "gelu"),
    "force_ln_scale": (False, False),
    "ln_positions": ("normformer", "normformer"),
    "ln_type": ("layernorm", "layernorm"),
    "normalize_text": (False, True),
    "scale_embedding": (False, False),
    "sinkhorn_iters": (1, 1),
    "tie_word_embeddings": (False, False),
    "use_absolute_position_embeddings": (True, True),
    "use_alibi": (False, False),
    "use_bias": (False, False),
    "use_cosine_attention": (False, False),
    "use_deepnet_scaling": (False, False),
    "use_final_ln_decoder": (True, True),
    "use_final_ln_encoder": (True, True),
    "use_glu": (True, True),
    "use_head_scale": (False, False),
    "use_swin_position_embeddings": (False, False),
}
"""Settings of dalle-mini that change the network: the default of a config without them, and the one that is ours."""

SIZES = {
    "d_model": "dim",
    "encoder_vocab_size": "text_vocab_size",
    "image_vocab_size": "image_vocab_size",
    "max_text_length": "text_positions",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_ffn_dim": "ffn_dim",
    "decoder_ffn_dim": "ffn_dim",
}
"""What the config says of the weights' shapes, and our names."""

NAMES = {
    r"layers\.FlaxBart(En|De)coderLayers\.": "layers.*.",
    r"layers\.FlaxBart(En|De)coderLayer_(\d+)\.": r"layers.\2.",
    r"\.GLU_0\.LayerNorm_(\d)\.": r".glu.ln\1.",
    r"\.GLU_0\.Dense_(\d)\.": r".glu.fc\1.",
    r"\.LayerNorm_0\.": ".pre_self_attn_layer_norm.",
    r"\.FlaxBartAttention_0\.": ".self_attn.",
    r"\.LayerNorm_1\.": ".self_attn_layer_norm.",
    r"\.LayerNorm_2\.": ".pre_encoder_attn_layer_norm.",
    r"\.FlaxBartAttention_1\.": ".encoder_attn.",
    r"\.LayerNorm_3\.": ".encoder_attn_layer_norm.",
    r"(kernel|scale|embedding)$": "weight",
}
"""Flax counts the parts of a layer in the order of their use. These are min-dalle's names, which ``assemble`` reads and
finds fault with where one is none; a * stands for every layer of a stack."""


def convert(
    path: Path, *, vqgan: str | Path | None = None, hashtag_words: Path | None = None, norm_eps: float = 1e-6
) -> tuple[Header, State]:
    """A DALL·E mini or mega in dalle-mini's files.

    Args:
        path: folder of the model.
        vqgan: folder of its VQGAN in Flax, its checkpoint in torch, min-dalle's ``detoker.pt``, or its id of the hub
            ("dalle-mini/vqgan_imagenet_f16_16384"); None = the folder ``vqgan`` in ``path``.
        hashtag_words: dalle-mini's list of words that takes hashtags apart, "enwiki-words-frequency.txt"; None = they
            stay in one piece.
        norm_eps: of the VQGAN's norms.

    Raises:
        ValueError: files are missing or of another kind, a setting that this network does not have, or weights that do
            not fit; names file and culprit.
    """
    if path.suffix == ".msgpack":
        refuse(path, "of Flax's weights give the folder, with config.json and the vocabulary")
    require(PACKAGES["dalle_mini"])
    settings = read_json(path / "config.json")
    heads = check_settings(path / "config.json", settings)
    source = path / "flax_model.msgpack"
    encoder, decoder = split(source, flax_reader.read(source))
    bos_id = settings.get("decoder_start_token_id", settings.get("image_vocab_size", 16_384))
    config, state = assemble(encoder, decoder, (str(source), str(source)), bos_id=bos_id, heads=heads)
    told = {name: (settings[name], getattr(config, ours)) for name, ours in SIZES.items() if name in settings}
    if wrong := [f"{name} = {said}, but {found}" for name, (said, found) in told.items() if said != found]:
        refuse(path / "config.json", f"{', '.join(wrong)} by the weights")
    tokenizer = read_any_tokenizer(path, hashtag_words)
    check_vocabulary(path, tokenizer, config)
    place = path / "vqgan" if vqgan is None else Path(vqgan)
    if vqgan is not None and not place.exists() and hub.is_hub_id(str(vqgan)):
        place = hub.fetch(str(vqgan))
    vae, weights = convert_vqgan(place, norm_eps=norm_eps)
    state |= {f"vae.{name}": tensor for name, tensor in weights.items()}
    return make_header(config, text_tokenizer=tokenizer, vae=vae), state


def check_settings(source: Path, settings: Mapping[str, Any]) -> int:
    """Refuse what this network does not have; the number of attention heads.

    Raises:
        ValueError: a variant of dalle-mini that was never released; names its field.
    """
    for name, (default, ours) in FIXED.items():
        if settings.get(name, default) != ours:
            refuse(source, f"{name} is {settings.get(name, default)!r}; only {ours!r} can be imported")
    pairs = {}
    for name, default in (("attention_heads", 16), ("ffn_dim", 4096)):
        pairs[name] = [settings.get(f"{side}_{name}", default) for side in ("encoder", "decoder")]
        if len(set(pairs[name])) > 1:
            refuse(source, f"encoder_{name} and decoder_{name} are {pairs[name]}; only equal ones can be imported")
    return pairs["attention_heads"][0]


def split(source: Path, arrays: dict[str, flax_reader.Array]) -> tuple[State, State]:
    """Weights of encoder and decoder under min-dalle's names. ``arrays`` is emptied.

    Raises:
        ValueError: an array that belongs to neither; names it.
    """
    states: dict[str, State] = {"encoder": {}, "decoder": {}}
    for key in list(arrays):
        match = re.fullmatch(r"model\.(encoder|decoder)\.(.+)", "model.decoder." * (key == "lm_head.kernel") + key)
        if match is None:
            refuse(source, f"no weights of a dalle-mini: it has {key}")
        name, tensor = rename_parts(match[2], NAMES), arrays.pop(key).read()
        stacked, kernel = "*" in name, key.endswith(".kernel")
        for layer, part in enumerate(tensor if stacked else [tensor]):
            weight = part.mT if kernel else part
            # a copy, so that no part keeps its whole stack in memory
            weight = weight.clone(memory_format=torch.contiguous_format) if stacked or kernel else weight
            states[match[1]][name.replace("*", str(layer))] = weight
    return states["encoder"], states["decoder"]


def read_any_tokenizer(path: Path, hashtag_words: Path | None) -> BartTokenizer:
    """The text tokenizer of a folder.

    Raises:
        ValueError: there is none, or it is no BPE; names the file.
    """
    file = path / "tokenizer.json"
    if file.exists():
        model = read_json(file).get("model", {})
        if not model.keys() >= {"vocab", "merges"}:
            refuse(file, "no byte-level BPE")
        # older files hold texts in place of pairs
        vocab = model["vocab"]
        merges = [read_merge(pair) if isinstance(pair, str) else (pair[0], pair[1]) for pair in model["merges"]]
    else:
        file = path / "vocab.json"
        vocab, merges = read_vocabulary(file, path / "merges.txt")
    words = None if hashtag_words is None else read_words(hashtag_words)
    return make_tokenizer(file, vocab, merges, normalize="dalle_mini", words=words)
