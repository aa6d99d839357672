"""The image tokenizers VQ-16 and VQ-8 of LlamaGen: taming's network in another layout, with codes of length 1.

Format: a torch file with the weights under ``model``, and after a training with averages under ``ema`` as well. Levels
lie in ``encoder.conv_blocks`` (finest first) and ``decoder.conv_blocks`` (coarsest first), the middles in ``mid.0`` to
``mid.2``.

Source: FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py and vq_train.py.
"""

from pathlib import Path

from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.importers.taming import numbers, vqgan_from_state
from dalle_pytorch.checkpoints.reader import read, weights_of
from dalle_pytorch.errors import refuse

SIGNATURE = frozenset({"encoder.conv_blocks.0.res.0.norm1.weight", "quantize.embedding.weight", "quant_conv.weight"})
GPT_SIGNATURE = frozenset({"tok_embeddings.weight", "layers.0.attention.wqkv.weight", "output.weight"})


def convert(path: Path, *, image_size: int = 256, ema: bool = False) -> tuple[Header, State]:
    """A VQ-16 or VQ-8 of LlamaGen.

    Args:
        path: the checkpoint.
        image_size: side of the picture, pixels; LlamaGen uses 256, 384 and 512 with the same weights.
        ema: take the averages of the weights, where the file has them; its GPTs were trained on codes of the others
            (extract_codes_c2i.py).

    Raises:
        ValueError: not such a file, or a weight is missing or left over; names file and culprit.
    """
    content = read(path)
    if ema and not (isinstance(content, dict) and isinstance(content.get("ema"), dict)):
        refuse(path, "has no averages of its weights: leave ema out")
    state = weights_of({"weights": content["ema"]} if ema else content)
    if state.keys() >= GPT_SIGNATURE:
        refuse(path, "a GPT of LlamaGen, which cannot be imported; its image tokenizers (vq_ds16_*, vq_ds8_*) can")
    if not state.keys() >= SIGNATURE:
        refuse(path, "not an image tokenizer of LlamaGen")
    try:
        state = rename(state, taming_names(1 + max(numbers(state, r"decoder\.conv_blocks\.(\d+)\..+"), default=0)))
        config, renamed = vqgan_from_state(
            state, pixel_range="minus_one_to_one", norm_eps=1e-6, image_size=image_size, normalize_codes=True
        )
    except ValueError as error:
        refuse(path, str(error))
    return make_header(config), renamed


def taming_names(levels: int) -> Table:
    """Key table to taming's names, for so many levels."""
    table: dict[str, str | None] = {
        r"quantize\.codebook_used": None,  # the last 65536 codes that training saw
        r"(encoder|decoder)\.mid\.0\.(.+)": r"\1.mid.block_1.\2",
        r"(encoder|decoder)\.mid\.1\.(.+)": r"\1.mid.attn_1.\2",
        r"(encoder|decoder)\.mid\.2\.(.+)": r"\1.mid.block_2.\2",
        r"(encoder)\.conv_blocks\.(\d+)\.res\.(.+)": r"\1.down.\2.block.\3",
        r"(encoder)\.conv_blocks\.(\d+)\.(attn|downsample)\.(.+)": r"\1.down.\2.\3.\4",
    }
    for index in range(levels):  # the decoder counts its levels from the coarsest
        level = levels - 1 - index
        table[rf"decoder\.conv_blocks\.{index}\.res\.(.+)"] = rf"decoder.up.{level}.block.\1"
        table[rf"decoder\.conv_blocks\.{index}\.(attn|upsample)\.(.+)"] = rf"decoder.up.{level}.\1.\2"
    same = r"(?:encoder|decoder)\.(?:conv_in|norm_out|conv_out)|quant_conv|post_quant_conv|quantize\.embedding"
    table[rf"((?:{same})\.(?:weight|bias))"] = r"\1"
    return table
