"""OpenAI's dVAE: the two files encoder.pkl and decoder.pkl, each a whole pickled module of the package ``dall-e`` 0.1.

Only their numbers and sizes are looked at; the package is not needed. Files of torch's old format and of its zip format
are the same to us, and so is a mere state dict in either.

Source: the names are those of dall_e/encoder.py, decoder.py and utils.py (https://github.com/openai/DALL-E). Weights of
convolutions are called ``w`` and ``b`` there.
"""

import re
from pathlib import Path

from torch import Tensor

from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import Stub, read, state_dict
from dalle_pytorch.errors import UserError, refuse
from dalle_pytorch.models.openai_dvae import OpenAIDVAEConfig

FILES = ("encoder.pkl", "decoder.pkl")
SIGNATURE = frozenset({"blocks.input.w", "blocks.group_1.block_1.res_path.conv_1.w", "blocks.output.conv.w"})
"""Weights that either file has."""

BLOCK = r"(encoder|decoder)\.blocks\.group_([1-4])\.block_(\d+)"
TABLE: Table = {
    r"(encoder|decoder)\.blocks\.input\.w": r"\1.input.weight",
    r"(encoder|decoder)\.blocks\.input\.b": r"\1.input.bias",
    rf"{BLOCK}\.id_path\.w": r"\1.groups.\2.\3.id_path.weight",
    rf"{BLOCK}\.id_path\.b": r"\1.groups.\2.\3.id_path.bias",
    rf"{BLOCK}\.res_path\.(conv_[1-4])\.w": r"\1.groups.\2.\3.\4.weight",
    rf"{BLOCK}\.res_path\.(conv_[1-4])\.b": r"\1.groups.\2.\3.\4.bias",
    r"(encoder|decoder)\.blocks\.output\.conv\.w": r"\1.output.weight",
    r"(encoder|decoder)\.blocks\.output\.conv\.b": r"\1.output.bias",
}
"""The part stands before its weights' names."""

ATTRIBUTES = {"n_hid": "hidden_dim", "n_blk_per_group": "num_blocks", "vocab_size": "codebook_size",
              "input_channels": "channels", "output_channels": "channels", "n_init": "init_dim"}  # fmt: skip
"""What a module says of its sizes, and our names of them."""


def convert(path: Path, *, image_size: int = 256) -> tuple[Header, State]:
    """Header and weights of an ``OpenAIDVAE``.

    Args:
        path: the folder of both files, or one of them; the other lies beside it.
        image_size: side of the pictures in pixels, which the files do not say; a multiple of 8.

    Returns:
        The weights in the type they are stored in (float32 in the released files), all but one views of the files.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: a file that is damaged, of another source, the other of the two, or that does not fit the other.
    """
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.name not in FILES:
        refuse(path, f"the files of OpenAI's dVAE are called {' and '.join(FILES)}; rename it, or give their folder")
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {' and no '.join(missing)}; OpenAI's dVAE is {' and '.join(FILES)}")
    contents = [read(folder / name) for name in FILES]
    try:
        config, state = openai_dvae_from_state(*map(state_dict, contents), image_size=image_size, names=FILES)
    except ValueError as error:
        refuse(folder, str(error))
    for name, content in zip(FILES, contents, strict=True):
        said = content.state if isinstance(content, Stub) and isinstance(content.state, dict) else {}
        for attribute, field in ATTRIBUTES.items():
            if attribute in said and said[attribute] != getattr(config, field):
                number = getattr(config, field)
                refuse(folder / name, f"says {attribute} = {said[attribute]!r}, but its weights have {number}")
    return make_header(config), state


def openai_dvae_from_state(
    encoder: State, decoder: State, *, image_size: int, names: tuple[str, str] = ("encoder", "decoder")
) -> tuple[OpenAIDVAEConfig, State]:
    """Config and weights from those of OpenAI's two modules.

    Args:
        encoder: its weights, ``blocks.*``.
        decoder: likewise.
        image_size: side of the pictures in pixels.
        names: of the two in messages.

    Raises:
        ValueError: weights left over, or that tell no sizes, the two swapped, or not of one network.
    """
    sizes = _encoder_sizes(encoder, names[0])
    of_decoder = _decoder_sizes(decoder, names[1])
    for size in sizes.keys() & of_decoder.keys():
        if sizes[size] != of_decoder[size]:
            raise UserError(
                f"{size} is {sizes[size]} in {names[0]} but {of_decoder[size]} in {names[1]}: not of one network"
            )
    config = OpenAIDVAEConfig(image_size=image_size, **{**sizes, **of_decoder})
    parts = {"encoder": encoder, "decoder": decoder}
    state = rename(
        {f"{part}.{key}": tensor for part, weights in parts.items() for key, tensor in weights.items()}, TABLE
    )
    # the 1 x 1 convolution of one-hot codes is a table of vectors
    state["decoder.input.weight"] = state["decoder.input.weight"].flatten(1).T.contiguous()
    return config, state


def _encoder_sizes(weights: State, name: str) -> dict[str, int]:
    """The config's values that the encoder's shapes tell."""
    first, last = _ends(weights, name)
    if first.shape[2] == 1:
        raise UserError(f"{name} holds a decoder: are the two swapped?")
    sizes = {"hidden_dim": first.shape[0], "channels": first.shape[1], "codebook_size": last.shape[0]}
    return {**sizes, "num_blocks": _num_blocks(weights)}


def _decoder_sizes(weights: State, name: str) -> dict[str, int]:
    """The config's values that the decoder's shapes tell."""
    first, last = _ends(weights, name)
    if first.shape[2] != 1:
        raise UserError(f"{name} holds an encoder: are the two swapped?")
    sizes = {"init_dim": first.shape[0], "codebook_size": first.shape[1], "hidden_dim": last.shape[1]}
    return {**sizes, "channels": last.shape[0] // 2, "num_blocks": _num_blocks(weights)}


def _ends(weights: State, name: str) -> tuple[Tensor, Tensor]:
    """The first and the last convolution of a module."""
    for key in sorted(SIGNATURE):
        if key not in weights:
            raise UserError(f"{name} is no part of OpenAI's dVAE: it has no weight {key}")
        if weights[key].ndim != 4:
            raise UserError(f"{name}: weight {key} is {tuple(weights[key].shape)}, a convolution's has 4 axes")
    return weights["blocks.input.w"], weights["blocks.output.conv.w"]


def _num_blocks(weights: State) -> int:
    """Blocks in the first group; if others have another number, weights will be missing or left over."""
    numbers = [re.match(r"blocks\.group_1\.block_(\d+)\.", key) for key in weights]
    return max(int(number[1]) for number in numbers if number)
