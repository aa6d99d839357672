"""Text encoders of transformers: from their folder or the hub, and again from a checkpoint of ours."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from dalle_pytorch.checkpoints import hub
from dalle_pytorch.errors import UserError, first_line, some
from dalle_pytorch.models.text_encoder import TextEncoder, TextEncoderConfig
from dalle_pytorch.text import HFDirectoryTokenizer

POSITIONS_BEHIND_PAD = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "data2vec-text",
    "longformer",
    "ibert",
)
"""Networks that count positions from the id of the padding on, and so have fewer than their settings say."""
PROBE = "a"  # a text of which any vocabulary has a token


def load_text_encoder(weights: str | Path) -> tuple[TextEncoder, HFDirectoryTokenizer]:
    """A text encoder with its tokenizer, frozen.

    Args:
        weights: a folder of transformers (config.json, safetensors, a tokenizer), or an id of the hub.

    Raises:
        FileNotFoundError: no such folder or id.
        UserError: it holds no text encoder; says what does not fit.
    """
    folder = Path(weights)
    if not folder.exists():
        if not hub.is_hub_id(str(weights)):
            raise FileNotFoundError(f"no folder {weights}; give a folder of transformers, or an id of the hub")
        folder = hub.fetch(str(weights))
    hint = f"{weights} is no text encoder that transformers can load from its safetensors"
    from transformers import AutoConfig, AutoModelForTextEncoding  # a second to import, and few need it

    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True)
        settings = getattr(settings, "text_config", settings)  # of two towers the one for text
        net, info = AutoModelForTextEncoding.from_pretrained(
            folder, config=settings, use_safetensors=True, local_files_only=True, output_loading_info=True,
            dtype=torch.float32,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{hint}: {first_line(error)}") from error
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        raise UserError(f"{hint}: it has no {some(missing)}")
    tokenizer = HFDirectoryTokenizer(folder)
    start, end = _marks(tokenizer)
    rows, ids = net.get_input_embeddings().num_embeddings, tokenizer.vocab_size - tokenizer.shift
    if ids > rows:
        raise UserError(f"{weights}: its tokenizer has {ids} ids, the encoder knows {rows}")
    network = json.loads(settings.to_json_string(use_diff=False))
    positions = getattr(settings, "max_position_embeddings", None)
    if positions is not None and settings.model_type in POSITIONS_BEHIND_PAD:
        positions -= settings.pad_token_id + 1
    config = TextEncoderConfig(
        network={key: value for key, value in network.items() if key not in ("_name_or_path", "transformers_version")},
        width=settings.hidden_size,
        max_tokens=positions,
        start_id=start,
        end_id=end,
        pad_id=getattr(settings, "pad_token_id", None) or 0,
        token_shift=tokenizer.shift,
    )
    return TextEncoder(config, _without_pooler(net)).requires_grad_(False).eval(), tokenizer


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """The encoder of a checkpoint, its weights yet to come.

    Raises:
        UserError: this version of transformers does not know the network.
    """
    from transformers import AutoConfig, AutoModelForTextEncoding

    settings: dict[str, Any] = dict(config.network)
    name = settings.pop("model_type", None)
    try:
        net: nn.Module = AutoModelForTextEncoding.from_config(AutoConfig.for_model(name, **settings))
    except (ValueError, KeyError) as error:
        raise UserError(f"transformers knows no text encoder {name!r}: {first_line(error)}") from error
    return TextEncoder(config, _without_pooler(net))


def _without_pooler(net: Any) -> nn.Module:
    """The network without what makes one feature of a text: it is not read, and often has no trained weights."""
    if getattr(net, "pooler", None) is not None:
        net.pooler = None
    return net


def _marks(tokenizer: HFDirectoryTokenizer) -> tuple[int | None, int | None]:
    """Ids that a tokenizer puts in front of a text and behind it.

    Raises:
        UserError: more than one on a side.
    """
    own = Tokenizer.from_str(tokenizer.state()["tokenizer"])
    plain, marked = (own.encode(PROBE, add_special_tokens=special).ids for special in (False, True))
    places = range(len(marked) - len(plain) + 1)
    at = next((i for i in places if marked[i : i + len(plain)] == plain), 0)
    before, after = marked[:at], marked[at + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise UserError(
            f"the tokenizer puts {len(before)} marks in front of a text and {len(after)} behind it, 1 at most"
        )
    return (before or [None])[0], (after or [None])[0]
