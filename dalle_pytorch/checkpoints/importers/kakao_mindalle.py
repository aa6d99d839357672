"""minDALL-E of Kakao Brain: a folder with config.yaml, tokenizer/, stage1_last.ckpt and stage2_last.ckpt.

Formats: two Lightning checkpoints with weights under ``state_dict``. Stage 1 is a VQGAN under taming's names. Stage 2
is a decoder-only transformer without <bos>: text and image tokens have a position table and a head each, and the first
text token is given. Text ids are those of a character-level BPE, which CharBPETokenizer of ``tokenizers`` reads.

Captions are filled up with one [PAD] there, with a pad of its own for each position here: all pads have [PAD]'s
embedding, and share its probability. Our id 0 is padding, so ids are one higher here where 0 is a token there.

Source: kakaobrain/minDALL-E (e548007), dalle/models/stage2/transformer.py, layers.py, tokenizer.py, utils/config.py.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import CharBPETokenizer
from torch import Tensor

from dalle_pytorch.checkpoints.checkpoint import Header, State, build, make_header
from dalle_pytorch.checkpoints.importers import taming
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import read, release, weights_of
from dalle_pytorch.errors import UserError, first_line, refuse, some
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.transformer import ForeignConfig
from dalle_pytorch.text import HFTokenizer

STAGES = ("stage1_last.ckpt", "stage2_last.ckpt")
VOCABULARY = ("tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt")
FILES = ("config.yaml", *STAGES, *VOCABULARY)
SIGNATURE = frozenset({"tok_emb_img.weight", "tok_emb_txt.weight", "blocks.0.attn.query.weight"})
"""Weights of stage 2."""

UNLIKELY = -1e4
"""Bias of text ids that do not exist there: no probability, in half precision too."""
TABLE: Table = {
    r"tok_emb_img\.weight": "image_emb.weight",
    r"tok_emb_txt\.weight": "text_emb.weight",
    r"pos_emb_img\.weight": "image_pos.weight",
    r"pos_emb_txt\.weight": "text_pos.weight",
    r"blocks\.(\d+)\.ln1\.(weight|bias)": r"transformer.blocks.\1.attn_norm.\2",
    r"blocks\.(\d+)\.ln2\.(weight|bias)": r"transformer.blocks.\1.ff_norm.\2",
    r"blocks\.(\d+)\.attn\.(query|key|value)\.(weight|bias)": r"transformer.blocks.\1.attention.\2.\3",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"transformer.blocks.\1.attention.to_out.\2",
    r"blocks\.(\d+)\.mlp\.0\.(weight|bias)": r"transformer.blocks.\1.feed_forward.to_hidden.\2",
    r"blocks\.(\d+)\.mlp\.2\.(weight|bias)": r"transformer.blocks.\1.feed_forward.to_out.\2",
    r"ln_f\.(weight|bias)": r"transformer.norm.\1",
    r"head_img\.weight": "image_head.weight",
    r"head_txt\.weight": "text_head.weight",
}


class Text(NamedTuple):
    """How its text ids become ours."""

    tokenizer: HFTokenizer
    shift: int
    """Our id less its own."""
    pad: int
    """Its [PAD]."""


def convert(path: Path) -> tuple[Header, State]:
    """The DALLE of a folder, with its VQGAN and its tokenizer.

    Args:
        path: the folder, as ``1.3B.tar.gz`` unpacks to.

    Raises:
        FileNotFoundError: a file of it is missing.
        ValueError: a file that is damaged or another one, a setting that is not supported, or weights that do not fit.
    """
    if missing := [name for name in FILES if not (path / name).is_file()]:
        raise FileNotFoundError(
            f"{path} has no {' and no '.join(missing)}; minDALL-E is a folder with {', '.join(FILES)}"
        )
    settings = read_config(path / "config.yaml")
    stages = [weights_of(read(path / name)) for name in STAGES]
    hint = "; are stage1_last.ckpt and stage2_last.ckpt swapped?" if stages[0].keys() >= SIGNATURE else ""
    if not stages[1].keys() >= SIGNATURE:
        refuse(
            path / STAGES[1],
            f"is no stage 2 of minDALL-E: it has no {some(sorted(SIGNATURE - stages[1].keys()))}{hint}",
        )
    text = read_tokenizer(path)
    try:
        vae, vae_state = taming.vqgan_from_state(
            stages[0], pixel_range="minus_one_to_one", norm_eps=1e-6, image_size=settings["resolution"]
        )
    except ValueError as error:
        refuse(path / STAGES[0], str(error))
    try:
        config, state = dalle_from_state(stages[1], heads=settings["n_heads"], shift=text.shift, pad=text.pad)
        if len(state["image_pos.weight"]) != (tokens := build(make_header(vae)).num_image_tokens):
            raise UserError(f"has positions of {len(state['image_pos.weight'])} image tokens, stage 1 makes {tokens}")
        if text.tokenizer.vocab_size > config.text_vocab_size:
            raise UserError(
                f"knows {config.text_vocab_size - text.shift} text ids, {VOCABULARY[0]} has "
                f"{text.tokenizer.vocab_size - text.shift}"
            )
    except ValueError as error:
        refuse(path / STAGES[1], str(error))
    header = make_header(config, text_tokenizer=text.tokenizer, vae=make_header(vae), training={"source": "minDALL-E"})
    return header, state | {f"vae.{key}": tensor for key, tensor in vae_state.items()}


def dalle_from_state(stage: State, *, heads: int, shift: int, pad: int) -> tuple[DALLEConfig, State]:
    """Config and weights of stage 2.

    Args:
        stage: its weights, under its names.
        heads: attention heads, which the shapes do not tell.
        shift: our text ids less its own, 0 or 1.
        pad: its id of [PAD].

    Raises:
        ValueError: a weight is missing or left over; names it.
    """
    depth = 1 + max((int(match[1]) for key in stage if (match := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    needed = ["tok_emb_txt.weight", "pos_emb_txt.weight", "pos_emb_img.weight", "head_txt.weight", "head_img.weight"]
    parts = [f"attn.{name}.{kind}" for kind in ("weight", "bias") for name in ("query", "key", "value")]
    needed += [f"blocks.{layer}.{part}" for layer in range(depth) for part in parts]
    if missing := [key for key in needed if key not in stage]:
        raise UserError(f"weights are missing: {some(missing)}")
    state = rename(stage, TABLE)
    (vocabulary, dim), text_len = state["text_emb.weight"].shape, len(state["text_pos.weight"])
    if dim % heads:
        raise UserError(f"its width ({dim}) is no multiple of n_heads ({heads}) in config.yaml")
    if not 0 <= pad < vocabulary:
        raise UserError(f"knows {vocabulary} text ids, and [PAD] is {pad}: not its tokenizer")
    for layer in range(depth):
        for kind in ("weight", "bias"):
            place = f"transformer.blocks.{layer}.attention"
            own = [state.pop(f"{place}.{name}.{kind}") for name in ("query", "key", "value")]
            state[f"{place}.to_qkv.{kind}"] = torch.cat(own)
            release()
    for name in ("text_emb.weight", "text_head.weight"):
        state[name] = _with_pads(state[name], shift, pad, text_len)
    bias = torch.zeros_like(state["text_head.weight"][:, 0])
    bias[:shift] = bias[shift + pad] = UNLIKELY
    bias[shift + vocabulary :] = -math.log(text_len)  # together the pads are as likely as [PAD]
    state["text_head.bias"] = bias
    state["image_head.bias"] = torch.zeros_like(state["image_head.weight"][:, 0])
    config = DALLEConfig(
        dim=dim,
        depth=depth,
        heads=heads,
        head_dim=dim // heads,
        gated=False,
        text_vocab_size=vocabulary + shift,
        text_len=text_len,
        positions="flat",
        shift_tokens=False,
        foreign=ForeignConfig(qkv_bias=True, bos=False, head_bias=True),
    )
    return config, state


def read_tokenizer(path: Path) -> Text:
    """The tokenizer of a folder, and how its ids become ours.

    Raises:
        ValueError: a file that is no vocabulary.
    """
    vocabulary, merges = (str(path / name) for name in VOCABULARY)
    try:
        theirs = CharBPETokenizer.from_file(vocabulary, merges, unk_token="[UNK]", lowercase=True)
    except Exception as error:  # `tokenizers` raises bare Exception
        refuse(path / VOCABULARY[0], f"is no vocabulary with merges of a BPE ({error})")
    theirs.add_special_tokens(["[PAD]"])
    ours = HFTokenizer.from_state({"kind": HFTokenizer.kind, "tokenizer": theirs.to_str()})
    shift = ours.vocab_size - (max(theirs.get_vocab().values()) + 1)
    return Text(ours, shift, theirs.token_to_id("[PAD]"))


def read_config(path: Path) -> dict[str, Any]:
    """What config.yaml says that the weights do not, with minDALL-E's defaults.

    Raises:
        ValueError: no yaml, or an activation that is not supported; names the file.
    """
    import yaml  # comes with Hydra; nothing else here needs it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        stages = [(content.get(name) or {}).get("hparams") or {} for name in ("stage1", "stage2")]
        found = {"resolution": 256, "n_heads": 24, "gelu_use_approx": False, **stages[0], **stages[1]}
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        refuse(path, f"is no config of minDALL-E ({first_line(error)})")
    if found["gelu_use_approx"]:
        refuse(path, "says gelu_use_approx, an approximation of GELU that is not supported")
    return found


def _with_pads(rows: Tensor, shift: int, pad: int, count: int) -> Tensor:
    """Rows of its text ids and then of our pads, copies of [PAD]'s."""
    return torch.cat([torch.zeros_like(rows[:shift]), rows, rows[pad].expand(count, -1)])
