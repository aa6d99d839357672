"""DALL·E mini and mega as the package min-dalle has them.

Formats: ``encoder.pt`` and ``decoder.pt``, dicts of tensors; ``vocab.json`` and ``merges.txt`` of BART; ``detoker.pt``,
the decoder of the VQGAN. They lie in ``dalle_bart_mini/``, ``dalle_bart_mega/`` and ``vqgan/`` of a folder, or side by
side as on the hub, where mini's names end in ``_mini``.

The files have no scale for the norms that a linear layer follows; files saved from min-dalle's own modules have one of
ones. All sizes but the number of heads are read from the shapes.

Source: github.com/kuprel/min-dalle 0.4.11, min_dalle/min_dalle.py and min_dalle/models/.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers.flax_vqgan import convert_vqgan
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.importers.taming import convert_detoker
from dalle_pytorch.checkpoints.reader import read, release, state_dict
from dalle_pytorch.errors import UserError, refuse, some
from dalle_pytorch.files import read_json
from dalle_pytorch.models.dalle_bart import DALLEBartConfig
from dalle_pytorch.text import BartTokenizer
from dalle_pytorch.text.bart import PACKAGES, require
from dalle_pytorch.text.bpe import Merge, read_merge

FILES = (
    ("encoder*.pt", "decoder*.pt", "vocab*.json", "merges*.txt"),
    ("dalle_bart_*/encoder.pt", "dalle_bart_*/decoder.pt", "vqgan/detoker.pt"),
)
HEAD_DIM = 64  # of both models

SCALES = r"(?:layers\.\d+\.(?:pre_self_attn_layer_norm|pre_encoder_attn_layer_norm|glu\.ln[01])|final_ln)\.weight"
"""Norms that a linear layer follows: all ones, or not there."""


def _stack(side: str, embedding: str) -> Table:
    """Rows of one of the two networks; parts of one product become ``name#0``, ``name#1``, ..."""
    layer, block = r"layers\.(\d+)\.", rf"{side}.blocks.\1."
    return {
        r"embed_tokens\.weight": f"{embedding}_emb.weight",
        r"embed_positions\.weight": f"{embedding}_pos.weight",
        r"layernorm_embedding\.(weight|bias)": rf"{embedding}_norm.\1",
        r"final_ln\.bias": f"{side}.norm.bias",
        rf"{layer}pre_self_attn_layer_norm\.bias": f"{block}attn_norm.bias",
        rf"{layer}self_attn\.q_proj\.weight": f"{block}attention.to_qkv.weight#0",
        rf"{layer}self_attn\.k_proj\.weight": f"{block}attention.to_qkv.weight#1",
        rf"{layer}self_attn\.v_proj\.weight": f"{block}attention.to_qkv.weight#2",
        rf"{layer}self_attn\.out_proj\.weight": f"{block}attention.to_out.weight",
        rf"{layer}self_attn_layer_norm\.(weight|bias)": rf"{block}attn_post.\2",
        rf"{layer}glu\.ln0\.bias": f"{block}feed_forward.norm.bias",
        rf"{layer}glu\.fc0\.weight": f"{block}feed_forward.to_hidden.weight#0",
        rf"{layer}glu\.fc1\.weight": f"{block}feed_forward.to_hidden.weight#1",
        rf"{layer}glu\.ln1\.bias": f"{block}feed_forward.hidden_norm.bias",
        rf"{layer}glu\.fc2\.weight": f"{block}feed_forward.to_out.weight",
    }


_LAYER, _BLOCK = r"layers\.(\d+)\.", r"decoder.blocks.\1."
ENCODER = _stack("encoder", "text")
DECODER = {
    **_stack("decoder", "image"),
    rf"{_LAYER}pre_encoder_attn_layer_norm\.bias": f"{_BLOCK}cross_norm.bias",
    rf"{_LAYER}encoder_attn\.q_proj\.weight": f"{_BLOCK}cross_attention.to_q.weight",
    rf"{_LAYER}encoder_attn\.k_proj\.weight": f"{_BLOCK}cross_attention.to_kv.weight#0",
    rf"{_LAYER}encoder_attn\.v_proj\.weight": f"{_BLOCK}cross_attention.to_kv.weight#1",
    rf"{_LAYER}encoder_attn\.out_proj\.weight": f"{_BLOCK}cross_attention.to_out.weight",
    rf"{_LAYER}encoder_attn_layer_norm\.(weight|bias)": rf"{_BLOCK}cross_post.\2",
    r"lm_head\.weight": "image_head.weight",
}
PARTS = {"to_qkv.weight": 3, "to_kv.weight": 2, "to_hidden.weight": 2}
"""Products that the source computes in so many parts."""


class Files(NamedTuple):
    """What a model is made of."""

    encoder: Path
    decoder: Path
    vocab: Path
    merges: Path
    detoker: Path


def convert(
    path: Path,
    *,
    mega: bool | None = None,
    normalize: str = "min_dalle",
    bos_id: int = 16_384,
    heads: int | None = None,
    norm_eps: float = 1e-6,
    vqgan: Path | None = None,
) -> tuple[Header, State]:
    """A DALL·E mini or mega in min-dalle's files.

    Args:
        path: a folder of models, one model's folder in it, or the files of the hub.
        mega: which of two that are there; None = the one that is there.
        normalize: how prompts are tidied, see ``BartTokenizer``: "min_dalle" as its users know it, "dalle_mini" as the
            models were trained.
        bos_id: the token that begins a picture. The models were trained with 16384, min-dalle takes 16383 by mistake.
        heads: attention heads, which no file tells; None = of 64 channels, as in both models.
        norm_eps: of the VQGAN's norms: 1e-6 as it was trained, 1e-5 for min-dalle's pixels.
        vqgan: a whole VQGAN in place of ``detoker.pt``, which has no encoder: completing pictures and training on
            pictures need it. Its folder in Flax (dalle-mini/vqgan_imagenet_f16_16384) or its checkpoint in torch.

    Raises:
        ValueError: files are missing, swapped or of another kind, or weights do not fit; names file and culprit.
        UserError: a package is missing that tidies prompts.
    """
    require(PACKAGES.get(normalize, ()))
    files = find_files(Path(path), mega, None if vqgan is None else Path(vqgan))
    encoder, decoder = state_dict(read(files.encoder)), state_dict(read(files.decoder))
    if "lm_head.weight" in encoder and "lm_head.weight" not in decoder:
        refuse(files.encoder, f"holds the decoder, and {files.decoder.name} the encoder: swap their names")
    sources = (str(files.encoder), str(files.decoder))
    config, state = assemble(encoder, decoder, sources, bos_id=bos_id, heads=heads)
    tokenizer = make_tokenizer(files.vocab, *read_vocabulary(files.vocab, files.merges), normalize=normalize)
    check_vocabulary(files.vocab, tokenizer, config)
    if vqgan is None:
        vae, weights = convert_detoker(files.detoker, norm_eps=norm_eps)
    else:
        vae, weights = convert_vqgan(files.detoker, norm_eps=norm_eps)
    state |= {f"vae.{name}": tensor for name, tensor in weights.items()}
    return make_header(config, text_tokenizer=tokenizer, vae=vae), state


def find_files(path: Path, mega: bool | None, vqgan: Path | None = None) -> Files:
    """The files of one model, in any of the three layouts, with the VQGAN that is given in place of theirs.

    Raises:
        ValueError: no model is there, two are and ``mega`` does not say which, or some files are missing; names them.
    """
    alone = "mini" if path.resolve().name == "dalle_bart_mini" else "mega"
    places = [
        ("mini", path / "dalle_bart_mini", ""),
        ("mega", path / "dalle_bart_mega", ""),
        ("mini", path, "_mini"),
        (alone, path, ""),
    ]
    wanted = ("mini", "mega") if mega is None else ("mega",) if mega else ("mini",)
    found = [
        (folder, suffix)
        for size, folder, suffix in places
        if size in wanted and any((folder / f"{name}{suffix}.pt").exists() for name in ("encoder", "decoder"))
    ]
    if not found:
        refuse(path, f"no DALL·E {' or '.join(wanted)} in min-dalle's files here: no encoder.pt and decoder.pt")
    if len(found) > 1:
        refuse(path, "holds a mini and a mega: choose with mega=false or mega=true")
    folder, suffix = found[0]
    detokers = (
        [vqgan] if vqgan else [folder / "detoker.pt", folder.parent / "vqgan" / "detoker.pt", path / "detoker.pt"]
    )
    files = Files(
        folder / f"encoder{suffix}.pt",
        folder / f"decoder{suffix}.pt",
        folder / f"vocab{suffix}.json",
        folder / f"merges{suffix}.txt",
        next((file for file in detokers if file.exists()), detokers[-2:][0]),
    )
    if missing := [str(file) for file in files if not file.exists()]:
        refuse(path, f"incomplete (kuprel/min-dalle on the hub has all files), without {', '.join(missing)}")
    return files


def assemble(
    encoder: State, decoder: State, sources: tuple[str, str], *, bos_id: int, heads: int | None
) -> tuple[DALLEBartConfig, State]:
    """Config and weights of a DALLEBart but for its image tokenizer. Both inputs are emptied, to free what is copied.

    Args:
        encoder: weights under min-dalle's names.
        decoder: likewise.
        sources: where they come from, for messages.
        bos_id: see ``convert``.
        heads: see ``convert``.

    Raises:
        ValueError: weights missing, left over or of shapes that do not fit; names source and culprit.
    """
    sizes = [_sizes(*pair) for pair in zip((encoder, decoder), sources, strict=True)]
    (text_rows, text_positions, dim, ffn_dim, encoder_layers), (image_rows, tokens, *same, decoder_layers) = sizes
    if same != [dim, ffn_dim]:
        raise UserError(f"{sources[1]}: width {same[0]} and ffn {same[1]}, but {dim} and {ffn_dim} in {sources[0]}")
    if math.isqrt(tokens) ** 2 != tokens:
        raise UserError(f"{sources[1]}: embed_positions.weight has {tokens} rows, no square grid")
    if heads is None and dim % HEAD_DIM:
        raise UserError(f"{sources[0]}: width {dim} is no multiple of {HEAD_DIM}; say how many heads= it has")
    config = DALLEBartConfig(
        dim=dim,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        heads=dim // HEAD_DIM if heads is None else heads,
        ffn_dim=ffn_dim,
        text_vocab_size=text_rows,
        text_positions=text_positions,
        image_vocab_size=image_rows - 1,
        bos_id=bos_id,
        grid_size=math.isqrt(tokens),
    )
    weights: State = {}
    for state, table, source in zip((encoder, decoder), (ENCODER, DECODER), sources, strict=True):
        try:
            _drop_scales(state)
            renamed = rename(state, table)
            state.clear()
            weights |= _join(renamed)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
    return config, weights


def _sizes(state: State, source: str) -> tuple[int, int, int, int, int]:
    """Rows of both embeddings, width, width of the feed-forward and layers."""
    keys = ("embed_tokens.weight", "embed_positions.weight", "layers.0.glu.fc0.weight")
    if missing := [key for key in keys if key not in state or state[key].ndim != 2]:
        raise UserError(f"{source}: no encoder or decoder of min-dalle, it lacks {', '.join(missing)}")
    (rows, dim), (positions, _), (ffn_dim, _) = (tuple(state[key].shape) for key in keys)
    layers = {int(match[1]) for key in state if (match := re.match(r"layers\.(\d+)\.", key))}
    return rows, positions, dim, ffn_dim, 1 + max(layers)


def _drop_scales(state: State) -> None:
    """Take out scales that are one; the norms have none."""
    scales = [key for key in state if re.fullmatch(SCALES, key)]
    if trained := [key for key in scales if not bool((state[key] == 1).all())]:
        raise UserError(f"trained scales that this network does not have (force_ln_scale): {some(trained)}")
    for key in scales:
        del state[key]


def _join(renamed: State) -> State:
    """Products in one piece; each part is freed when its product is made."""
    joined: State = {}
    for key in list(renamed):
        if key not in renamed:  # a part of what was joined before
            continue
        name, part, _ = key.partition("#")
        if not part:
            joined[name] = renamed.pop(key)
            continue
        count = next(count for ending, count in PARTS.items() if name.endswith(ending))
        if missing := [i for i in range(count) if f"{name}#{i}" not in renamed]:
            raise UserError(f"{len(missing)} of the {count} parts of {name} are missing")
        parts = [renamed.pop(f"{name}#{i}") for i in range(count)]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"the parts of {name} have shapes {[tuple(part.shape) for part in parts]}, not one")
        joined[name] = torch.cat(parts)
        release()
    return joined


def read_vocabulary(vocab: Path, merges: Path) -> tuple[dict[str, int], list[Merge]]:
    """Symbols with their ids, and merges, of ``vocab.json`` and ``merges.txt``.

    Raises:
        ValueError: one of them is no such file; names it.
    """
    symbols = read_json(vocab)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
        return symbols, [read_merge(line) for line in lines if line and not line.startswith("#version")]
    except (OSError, ValueError) as error:
        refuse(merges, f"no list of merges ({error})")


def make_tokenizer(source: Path, vocab: dict[str, int], merges: list[Merge], **options: Any) -> BartTokenizer:
    """The text tokenizer of what a file holds.

    Raises:
        ValueError: another kind of vocabulary; names the file.
    """
    try:
        return BartTokenizer(vocab, merges, **options)
    except ValueError as error:
        refuse(source, str(error))


def check_vocabulary(source: Path, tokenizer: BartTokenizer, config: DALLEBartConfig) -> None:
    """Refuse text tokens that the network has no embedding for.

    Raises:
        ValueError: the vocabulary is too large; names both numbers.
    """
    if tokenizer.vocab_size > config.text_vocab_size:
        refuse(
            source, f"{tokenizer.vocab_size} text tokens, the encoder embeds {config.text_vocab_size}: another model's"
        )
