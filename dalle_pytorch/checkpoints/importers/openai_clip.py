"""OpenAI's CLIPs: ViT-B/32, B/16, L/14, L/14@336px, RN50, RN101, RN50x4, RN50x16, RN50x64.

Format: a TorchScript archive (ViT-B-32.pt) with half-precision weights, or their state dict in a torch or safetensors
file. Sizes are read from the shapes, as ``build_model`` does; attention heads are 64 wide.

Sources: github.com/openai/CLIP, clip/model.py and clip/clip.py.
"""

from pathlib import Path

from dalle_pytorch.checkpoints.checkpoint import Header, State, make_header
from dalle_pytorch.checkpoints.importers.clip_weights import TRANSPOSED, block_rows, finish, make_config, sizes
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import read, weights_of
from dalle_pytorch.errors import refuse
from dalle_pytorch.text import CLIPTokenizer

SIGNATURE = frozenset({"visual.conv1.weight", "token_embedding.weight", "text_projection", "input_resolution"})
PLAIN_SIGNATURE = SIGNATURE - {"input_resolution"}
"""Of its state dict alone, which open_clip's models without a config have too."""
HEAD_WIDTH = 64

ENDS = r"(weight|bias)"
BLOCK = {
    r"attn\.in_proj_": "qkv",
    r"attn\.out_proj\.": "out",
    r"ln_1\.": "norm1",
    r"ln_2\.": "norm2",
    r"mlp\.c_fc\.": "up",
    r"mlp\.c_proj\.": "down",
}
TEXT_TABLE: Table = {
    r"token_embedding\.weight": "text.tokens.weight",
    r"positional_embedding": "text.positions",
    **block_rows(r"transformer\.resblocks\.(\d+)\.", "text", BLOCK),
    rf"ln_final\.{ENDS}": r"text.norm.\1",
    r"text_projection": f"text.proj.weight{TRANSPOSED}",
    r"logit_scale": "log_logit_scale",
}
TRANSFORMER_TABLE: Table = {
    r"visual\.conv1\.weight": "image.patches.weight",
    r"visual\.class_embedding": "image.class_token",
    r"visual\.positional_embedding": "image.positions",
    rf"visual\.ln_(pre|post)\.{ENDS}": r"image.norm_\1.\2",
    **block_rows(r"visual\.transformer\.resblocks\.(\d+)\.", "image", BLOCK),
    r"visual\.proj": f"image.proj.weight{TRANSPOSED}",
}
NORM = r"(weight|bias|running_mean|running_var)"
RESNET_TABLE: Table = {
    r"visual\.(?:.+\.)?num_batches_tracked": None,  # of the training
    r"visual\.conv([123])\.weight": r"image.conv\1.weight",
    rf"visual\.bn([123])\.{NORM}": r"image.norm\1.\2",
    **{
        rf"visual\.layer{stage + 1}\.(\d+)\.{source}": rf"image.stages.{stage}.\1.{target}"
        for stage in range(4)
        for source, target in (
            (r"conv([123])\.weight", r"conv\2.weight"),
            (rf"bn([123])\.{NORM}", r"norm\2.\3"),
            (r"downsample\.0\.weight", r"shortcut_conv.weight"),
            (rf"downsample\.1\.{NORM}", r"shortcut_norm.\2"),
        )
    },
    r"visual\.attnpool\.positional_embedding": "image.pool.positions",
    rf"visual\.attnpool\.([qkv])_proj\.{ENDS}": r"image.pool.\1.\2",
    rf"visual\.attnpool\.c_proj\.{ENDS}": r"image.pool.out.\1",
}
SCALARS: Table = {r"input_resolution|context_length|vocab_size": None}  # the shapes tell them


def convert(path: Path) -> tuple[Header, State]:
    """A CLIP that OpenAI released.

    Args:
        path: the archive, or a file with its state dict.

    Returns:
        Header and weights; with CLIP's text tokenizer where the vocabulary has its size, else with none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file; names it and the culprit.
    """
    state = weights_of(read(path))
    if not state.keys() >= PLAIN_SIGNATURE:
        refuse(path, "not a CLIP of OpenAI")
    try:
        return from_state(state)
    except ValueError as error:
        refuse(path, str(error))


def from_state(state: State) -> tuple[Header, State]:
    """Header and weights of a state dict under OpenAI's names.

    Raises:
        ValueError: a weight is missing, left over or of another shape; names it.
    """
    tower = RESNET_TABLE if "visual.attnpool.positional_embedding" in state else TRANSFORMER_TABLE
    renamed = finish(rename(state, {**SCALARS, **TEXT_TABLE, **tower}))
    found, tokenizer = sizes(renamed), CLIPTokenizer()
    channels = 32 * found["image_width"] if "image_stages" in found else found["image_width"]
    vocab_size = found["text_vocab_size"]
    told = {
        "image_heads": channels // HEAD_WIDTH,
        "text_heads": found["text_width"] // HEAD_WIDTH,
        "start_id": vocab_size - 2,  # the last ids, of which the very last is found by argmax
        "end_id": vocab_size - 1,
    }
    config = make_config(renamed, told)
    return make_header(config, text_tokenizer=tokenizer if vocab_size == tokenizer.vocab_size else None), renamed
