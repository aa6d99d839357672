"""Checkpoints of lucidrains/DALLE-pytorch 1.6.6: ``vae.pt`` of its train_vae.py and ``dalle.pt`` of its train_dalle.py.

Formats: torch files, {hparams, weights} and {hparams, vae_params, epoch, version, vae_class_name, weights, opt_state,
scheduler_state}; and the folder ``dalle-ds-cp`` of a training with DeepSpeed up to ZeRO 2. A ``dalle.pt`` holds its
image tokenizer, one of three: its own DiscreteVAE, OpenAI's or a VQGAN of taming-transformers. Names of layers tell of
the wrappers around them: token shift adds two, the cache one.

All options become options of ours, so that outputs are the same. What is not in the outputs differs in training:
- ``stable`` there divides the gradient of the embeddings by 10; here they learn like the rest;
- the loss is ours: of the pads only the first counts (see compat.py);
- optimiser and schedule are not taken over.

Source: dalle_pytorch.py, transformer.py, attention.py, reversible.py, train_vae.py and train_dalle.py of 1.6.6;
axial-positional-embedding 0.3.12 (``weights.0``) and 0.2.1 (``weights_0``).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dalle_pytorch.checkpoints.checkpoint import Header, State, build, make_header
from dalle_pytorch.checkpoints.importers import openai_dvae, taming
from dalle_pytorch.checkpoints.importers.lucidrains_vae import VAE_SIGNATURE, filled, vae_from_state
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import plain, read, state_dict
from dalle_pytorch.errors import UserError, refuse, some
from dalle_pytorch.models.attention import dalle_pytorch_angles
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.transformer import ForeignConfig
from dalle_pytorch.text import CLIPTokenizer, HFDirectoryTokenizer, HFTokenizer, TextTokenizer

SIGNATURE = frozenset({"to_logits.1.weight", "transformer.layers.layers.0.0.scale"})
REVERSIBLE_SIGNATURE = frozenset({"to_logits.1.weight", "transformer.layers.blocks.0.f.net.scale"})

NO_DALLE = (
    "is no vae.pt or dalle.pt of DALLE-pytorch, which hold hparams and weights: save weights alone again as "
    "{'hparams': ..., 'vae_params': ..., 'weights': weights}, with the arguments of DALLE(...) and DiscreteVAE(...)"
)
DEEPSPEED = ("auxiliary.pt", "latest")
"""Files of the folder that a training with DeepSpeed leaves."""
DEEPSPEED_STATES = "mp_rank_00_model_states.pt"
JOIN_SHARDS = (
    "give the folder that training left (dalle-ds-cp); where its weights lie in shards (ZeRO 3) join them first: run "
    "its zero_to_fp32.py, put the result under 'weights' in auxiliary.pt in place of the "
    "text, and save that as dalle.pt"
)

CLIP_VOCABULARY = 49_408
"""Ids of its default tokenizer."""
DALLE_HPARAMS: dict[str, Any] = {
    "dim": None,
    "depth": None,
    "num_text_tokens": 10_000,
    "text_seq_len": 256,
    "heads": 8,
    "dim_head": 64,
    "reversible": False,
    "attn_dropout": 0.0,
    "ff_dropout": 0.0,
    "sparse_attn": False,
    "attn_types": None,
    "loss_img_weight": 7,
    "stable": False,
    "sandwich_norm": False,
    "shift_tokens": True,
    "rotary_emb": True,
    "shared_attn_ids": None,
    "shared_ff_ids": None,
    "share_input_output_emb": False,
    "optimize_for_inference": False,
}
"""Arguments of its DALLE and their defaults; dim and depth have none."""


def convert(
    path: Path,
    *,
    vqgan_config: Path | None = None,
    tokenizer: Path | None = None,
    caption_dropout: float = 0.0,
) -> tuple[Header, State]:
    """A DiscreteVAE of ``vae.pt``, or the DALLE of ``dalle.pt`` with its image tokenizer.

    Args:
        path: the file, or the folder of DeepSpeed.
        vqgan_config: yaml of the VQGAN that a ``dalle.pt`` holds; compared with the weights, which tell all sizes.
        tokenizer: tokenizer.json of its HugTokenizer (``--hug --bpe_path``), or a folder with a Hugging Face tokenizer
            (bert-base-chinese for ``--chinese``). The file does not say which it was; None = the default one, CLIP's,
            for a vocabulary of 49,408 ids, and none for others. Id 0 is padding there wherever it stands, and is left
            out of captions here.
        caption_dropout: share of empty captions in its training (``null_cond_prob``), which the file does not say;
            guidance needs a model that has seen some.

    Raises:
        FileNotFoundError: no such file or tokenizer.
        ValueError: not such a file, options that could not run there, or weights that do not fit; names the culprit.
    """
    content = read_content(path)
    weights = state_dict(content["weights"])
    content |= {name: plain(content[name]) for name in ("hparams", "vae_params") if name in content}
    for name in ("hparams", "vae_params"):
        if not isinstance(content.get(name, {}), dict | None):
            refuse(path, f"its {name} are no dict of settings")
    try:
        if "vae_params" not in content:
            if not weights.keys() >= VAE_SIGNATURE:
                raise UserError("is a file of DALLE-pytorch, but neither its vae.pt nor its dalle.pt")
            config, state = vae_from_state(weights, content["hparams"])
            return make_header(config), state
        options = {"caption_dropout": caption_dropout, "vqgan_config": vqgan_config, "path": path}
        config, vae, state = dalle_from_state(weights, content["hparams"], content["vae_params"], **options)
        text = text_tokenizer(config.text_vocab_size, tokenizer)
    except ValueError as error:
        version = f" (the file is of DALLE-pytorch {content['version']})" if "version" in content else ""
        refuse(path, f"{error}{version}")
    notes = {"source": "DALLE-pytorch", "version": content.get("version"), "epoch": content.get("epoch")}
    return make_header(config, text_tokenizer=text, vae=make_header(vae), training=notes), state


def read_content(path: Path) -> dict[str, Any]:
    """What a file says, with the weights under ``weights``; those of DeepSpeed lie in another file of its folder.

    Raises:
        UserError: not such a file or folder, or a DeepSpeed checkpoint whose weights are in shards; says the mend.
    """
    # the folder, or a file in it: auxiliary.pt, or global_step*/mp_rank_00_model_states.pt
    folder = next((place for place in (path, *path.parents[:2]) if (place / DEEPSPEED[0]).is_file()), path.parent)
    content = read(folder / DEEPSPEED[0] if path.is_dir() else path)
    if not isinstance(content, dict):
        refuse(path, NO_DALLE)
    if is_deepspeed(content):
        if not all((folder / name).is_file() for name in DEEPSPEED):
            refuse(path, f"holds no weights, it only describes a DeepSpeed checkpoint: {JOIN_SHARDS}")
        states = folder / Path((folder / DEEPSPEED[1]).read_text().strip()).name / DEEPSPEED_STATES
        if not states.is_file() or any(states.parent.glob("zero_pp_rank_*_model_states.pt")):
            refuse(path, f"is a DeepSpeed checkpoint without its {DEEPSPEED_STATES}, or in shards: {JOIN_SHARDS}")
        about, states = read(folder / DEEPSPEED[0]), read(states)
        content = {**about, "weights": states.get("module") if isinstance(states, dict) else None}
    if not {"hparams", "weights"} <= content.keys():
        refuse(path, NO_DALLE)
    return content


def is_deepspeed(content: Any) -> bool:
    """Whether a file is one of a DeepSpeed checkpoint: DALLE-pytorch puts a text in the place of the weights."""
    return isinstance(content, dict) and (isinstance(content.get("weights"), str) or "ds_version" in content)


def dalle_from_state(
    weights: State,
    hparams: Mapping[str, Any],
    vae_params: Mapping[str, Any] | None,
    *,
    path: Path,
    caption_dropout: float = 0.0,
    vqgan_config: Path | None = None,
) -> tuple[DALLEConfig, Any, State]:
    """Configs of its DALLE and of the image tokenizer in it, and the weights of both.

    Raises:
        ValueError: an unknown setting, a pattern that could not run, or weights missing or left over; names it.
    """
    h = filled(hparams, DALLE_HPARAMS, "DALLE")
    if h["dim"] is None or h["depth"] is None:
        raise UserError("hparams has no dim or no depth")
    config = dalle_config(h, caption_dropout)
    of_vae = {key.removeprefix("vae."): tensor for key, tensor in weights.items() if key.startswith("vae.")}
    vae, vae_state = _image_tokenizer(of_vae, vae_params, vqgan_config, path)
    state = rename({key: tensor for key, tensor in weights.items() if not key.startswith("vae.")}, dalle_table(h))
    needed = ["head.weight", "head.bias", *([] if config.tie_embeddings else ["text_emb.weight"])]
    needed += ["transformer.pos_emb"] if config.rotated else ["row_pos.weight", "col_pos.weight"]
    if missing := [key for key in needed if key not in state]:
        raise UserError(f"weights are missing: {some(missing)}")
    if config.rotated:
        _check_angles(state.pop("transformer.pos_emb"), config, build(make_header(vae)).grid_size)
    else:
        for name in ("row_pos.weight", "col_pos.weight"):
            state[name] = state[name].flatten(0, -2)
    for key in [key for key in state if key.endswith(".factor")]:
        state[key] = state[key].flatten()
    text = config.text_vocab_size + config.text_len  # one head scores the text ids and then the image tokens
    for name in ("weight", "bias"):
        head = state.pop(f"head.{name}")
        state[f"text_head.{name}"], state[f"image_head.{name}"] = head[:text], head[text:]
    ids = state["text_head.weight" if config.tie_embeddings else "text_emb.weight"]
    state["bos"] = ids[0].clone()  # its <bos> is id 0, which is nothing else there: a 0 in a text becomes a pad
    return config, vae, state | {f"vae.{key}": tensor for key, tensor in vae_state.items()}


def dalle_config(h: Mapping[str, Any], caption_dropout: float) -> DALLEConfig:
    """Our config of its settings.

    Raises:
        ValueError: a setting out of range, or the pattern "sparse".
    """
    patterns = list(h["attn_types"] or ["full"])
    if "sparse" in patterns:
        raise UserError(
            "attn_types has sparse, DeepSpeed's block-sparse attention, which 1.6.6 itself cannot run; "
            "of its patterns full, axial_row, axial_col and conv_like can be imported"
        )
    return DALLEConfig(
        dim=h["dim"],
        depth=h["depth"],
        heads=h["heads"],
        head_dim=h["dim_head"],
        attn_dropout=float(h["attn_dropout"]),
        ff_dropout=float(h["ff_dropout"]),
        sandwich_norm=h["sandwich_norm"],
        stable=h["stable"],
        checkpoint_activations=h["reversible"],
        shared_attn_ids=_ids(h["shared_attn_ids"]),
        shared_ff_ids=_ids(h["shared_ff_ids"]),
        text_vocab_size=h["num_text_tokens"],
        text_len=h["text_seq_len"],
        attn_types=patterns,
        conv_kernel=5,
        positions="rotary" if h["rotary_emb"] else "learned",
        shift_tokens=h["shift_tokens"],
        loss_img_weight=float(h["loss_img_weight"]),
        tie_embeddings=h["share_input_output_emb"],
        caption_dropout=caption_dropout,
        foreign=ForeignConfig(
            divide_max=h["stable"],
            layer_scale=True,
            reversible=h["reversible"],
            rotate_values=h["rotary_emb"],
            rotary="dalle_pytorch" if h["rotary_emb"] else "grid",
            attn_semantics="dalle_pytorch",
            head_bias=True,
        ),
    )


def dalle_table(h: Mapping[str, Any]) -> Table:
    """What becomes of the weights of its DALLE, its image tokenizer apart."""
    table: dict[str, str | None] = {
        r"to_logits\.0\.(weight|bias)": r"transformer.norm.\1",
        r"to_logits\.1\.(weight|bias)": r"head.\1",
    }
    if h["share_input_output_emb"]:
        table[r"(text|image)_emb\.linear\.(weight|bias)"] = None  # the head again
    else:
        table[r"(text|image)_emb\.weight"] = r"\1_emb.weight"
    if h["rotary_emb"]:
        table[r"transformer\.pos_emb"] = "transformer.pos_emb"
    else:
        table[r"text_pos_emb\.weight"] = "text_pos.weight"
        table[r"image_pos_emb\.weights[._]0"] = "row_pos.weight"
        table[r"image_pos_emb\.weights[._]1"] = "col_pos.weight"
    wrappers = 2 if h["shift_tokens"] else 0
    inside = {
        "attn": (wrappers + 3, {"to_qkv": "attention.to_qkv", r"to_out\.0": "attention.to_out"}),
        "ff": (wrappers + 2, {r"net\.0": "feed_forward.to_hidden", r"net\.3": "feed_forward.to_out"}),
    }
    places = {"attn": r"blocks\.(\d+)\.f\.net", "ff": r"blocks\.(\d+)\.g\.net"}
    if not h["reversible"]:
        places = {"attn": r"layers\.(\d+)\.0", "ff": r"layers\.(\d+)\.1"}
    for part, (depth, names) in inside.items():
        source = rf"transformer\.layers\.{places[part]}"
        table[rf"{source}\.scale"] = rf"transformer.blocks.\1.{part}_post.factor"
        table[rf"{source}\.fn\.norm\.(weight|bias)"] = rf"transformer.blocks.\1.{part}_norm.\2"
        table[rf"{source}\.fn\.norm_out\.(weight|bias)"] = rf"transformer.blocks.\1.{part}_post.inner.\2"
        wrapped = rf"{source}\." + r"fn\." * depth
        for name, target in names.items():
            table[rf"{wrapped}{name}\.(weight|bias)"] = rf"transformer.blocks.\1.{target}.\2"
    return table


def text_tokenizer(vocabulary: int, path: Path | None) -> TextTokenizer | None:
    """The tokenizer whose ids its text embeddings have, as far as it is known.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another number of ids, or none that can be read; names both.
    """
    if path is None:
        return CLIPTokenizer() if vocabulary == CLIP_VOCABULARY else None
    found = HFDirectoryTokenizer(path) if path.is_dir() else HFTokenizer(path)
    state = found.state()
    state["tokenizer"] = json.dumps(_with_padding_at_zero(json.loads(state["tokenizer"]), path))
    found = type(found).from_state(state)
    if found.vocab_size != vocabulary:
        raise UserError(f"was trained with {vocabulary} text ids, {path} has {found.vocab_size}: not its tokenizer")
    return found


def _with_padding_at_zero(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    """A tokenizer.json whose id 0 is no word, as DALLE-pytorch takes it: our ids are then the file's."""
    zero, model = Tokenizer.from_str(json.dumps(spec)).id_to_token(0), spec["model"]
    if zero is None:
        raise UserError(f"{path} has no id 0, which is padding in DALLE-pytorch")
    if model.get("unk_token") == zero and model["type"] == "BPE":
        model["unk_token"] = None  # unknown characters, padding there, are left out
    if model.get("unk_token") == zero or model.get("unk_id") == 0:
        raise UserError(f"{path} has its token of unknown words at id 0, which is padding in DALLE-pytorch")
    others = [token for token in spec["added_tokens"] if token["id"] != 0]
    padding = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {**spec, "added_tokens": [{"id": 0, "content": zero, "special": True, **padding}, *others]}


def _image_tokenizer(
    weights: State, params: Mapping[str, Any] | None, vqgan_config: Path | None, path: Path
) -> tuple[Any, State]:
    """Config and weights of the image tokenizer in a ``dalle.pt``; its names say which it is."""
    of_model = {key.removeprefix("model."): tensor for key, tensor in weights.items() if key.startswith("model.")}
    if vqgan_config is not None and not of_model:
        raise UserError(f"holds no VQGAN, so vqgan_config={vqgan_config} is of no use")
    if of_model:
        settings = {"pixel_range": "minus_one_to_one", "norm_eps": 1e-6, "image_size": 256}  # its VQGanVAE's
        config, state = taming.vqgan_from_state(of_model, **settings)
        if vqgan_config is not None:
            taming.compare(path, config, vqgan_config, taming.read_yaml(vqgan_config))
        return config, state
    if any(key.startswith("enc.") for key in weights):
        parts = ({k.removeprefix(p): t for k, t in weights.items() if k.startswith(p)} for p in ("enc.", "dec."))
        return openai_dvae.openai_dvae_from_state(*parts, image_size=256)
    if params is None:
        raise UserError(
            "has no vae_params, and its image tokenizer is neither OpenAI's (vae.enc.*) nor a VQGAN (vae.model.*)"
        )
    return vae_from_state(weights, params)


def _ids(ids: Any) -> list[int] | None:
    """Ids of shared layers as numbers; train_dalle.py keeps words."""
    if ids is None:
        return None
    order = list(dict.fromkeys(ids))
    return [order.index(name) for name in ids]


def _check_angles(angles: torch.Tensor, config: DALLEConfig, grid_size: int) -> None:
    """Refuse rotary angles that are not those of 1.6.6, up to the rounding of their type.

    Raises:
        ValueError: they differ, as files of before 1.1.4 do.
    """
    ours = dalle_pytorch_angles(config.text_length, grid_size, config.head_dim)
    ours = ours[:, : 3 * (config.head_dim // 3 // 2)].repeat_interleave(2, dim=-1)
    error = max(1e-5, torch.finfo(angles.dtype).eps)
    same = angles.shape[1:] == ours.shape and torch.allclose(angles[0].float(), ours, rtol=error, atol=error)
    if not same:
        raise UserError("transformer.pos_emb has other rotary angles than DALLE-pytorch 1.6.6 computes: an older file?")
