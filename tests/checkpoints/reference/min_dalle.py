"""Record what min-dalle makes of seeded weights: text tokens, encoder outputs, logits, and the tokens that it samples.

It needs emoji, numpy, pillow and requests; ``-P`` keeps this file from standing in for the package of its name:

    pip install --no-deps --target min_dalle min-dalle==0.4.11
    PYTHONPATH=min_dalle python -P tests/checkpoints/reference/min_dalle.py

The weights are those of ``seeded.fill`` with seed 1 for the encoder and 2 for the decoder, under the keys of the
released files: without the scales that ``SCALES`` names.
"""

import importlib.util
import json
import random
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SMALL = {"layer_count": 2, "embed_count": 128, "attention_head_count": 2, "glu_embed_count": 96}
FULL = {
    "mini": (
        {"layer_count": 12, "embed_count": 1024, "attention_head_count": 16, "glu_embed_count": 2730},
        50264,
        16384,
    ),
    "mega": (
        {"layer_count": 24, "embed_count": 2048, "attention_head_count": 32, "glu_embed_count": 4096},
        50272,
        16415,
    ),
}
TEXT_VOCAB, IMAGE_VOCAB = 120, 16384
SCALES = r"(layers\.\d+\.(pre_self_attn_layer_norm|pre_encoder_attn_layer_norm|glu\.ln[01])|final_ln)\.weight"
"""Norms that have no scale in Flax, and none in the files."""
PROMPT = "The cat & a thin painting, café no. 7"
SAMPLES = [
    {"seed": 7, "grid_size": 2, "top_k": 256, "temperature": 1.0, "supercondition_factor": 16},
    {"seed": 3, "grid_size": 1, "top_k": 64, "temperature": 0.7, "supercondition_factor": 4},
]
COLUMNS = [0, 1, 2, 63, 255, 4095, 8191, 12345, 16383, 16384]
"""Rows of the head whose logits are kept."""

ALPHABET = "Ġabcdefghijklmnopqrstuvwxyz0123456!\"#$%&'()*,-./:;<=>?@[]_"  # 7, 8, 9, ~ and others are unknown
MERGES = [
    *["t h", "th e", "Ġ the", "Ġ a", "i n", "in g", "a t", "c at", "Ġ cat", "h e", "r e", "re d", "Ġ red", "a n"],
    *["an d", "Ġ and", "Ġ c", "o n", "e r", "Ġ p", "Ġp a", "in t", "s t", "_ f", "a c", "ac e", "_f ace", "1 0"],
    *["10 0", "Ġ 1", "l l", "e e", "o u", "Ġ s", "< s", "<s >"],
]
PIECES = [
    *["a cat", "The CAT", "  two  spaces ", "tab\there", "new\nline", "café", "naïve Ærø", "100 things", "3.14"],
    *["7,000", "😀", "❤️ red", "🇨🇮", "👩‍🚀", "it's", "don't", "#hashtag", "re-read", "<s>", "</s>", "<pad>", "<unk>"],
    *[
        "~tilde^",
        "日本",
        "“quoted”",
        "painting of",
        "and",
        "andand",
        "thethe",
        "ill",
        "(in)",
        "100%",
        "&amp;",
        "_face_",
    ],
    "x" * 30,
]


def load_seeded():
    """The script beside this one."""
    spec = importlib.util.spec_from_file_location("seeded", Path(__file__).with_name("seeded.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package():
    """min-dalle, whose import switches gradients off and sets the number of threads."""
    before = torch.is_grad_enabled(), torch.get_num_threads()
    import min_dalle.min_dalle as module

    torch.set_grad_enabled(before[0])
    torch.set_num_threads(before[1])
    return module


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """A small vocabulary in BART's manner."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<mask>"]
    return {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}, MERGES


def captions() -> list[str]:
    """Strings of all sorts, the same in every run."""
    rng = random.Random(0)
    return ["", " ", "a", PROMPT, *PIECES, *(" ".join(rng.choices(PIECES, k=rng.randint(2, 5))) for _ in range(200))]


def networks(module, sizes: dict[str, int], text_vocab: int, image_vocab: int):
    """Encoder and decoder."""
    encoder = module.DalleBartEncoder(text_vocab_count=text_vocab, text_token_count=64, device="cpu", **sizes)
    return encoder.eval(), module.DalleBartDecoder(image_vocab_count=image_vocab, device="cpu", **sizes).eval()


def in_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the files hold of a module's weights."""
    return {key: tensor for key, tensor in state.items() if not re.fullmatch(SCALES, key)}


def model(module, seeded):
    """A MinDalle without downloads."""
    made = object.__new__(module.MinDalle)
    made.device, made.dtype, made.is_reusable, made.is_verbose = "cpu", torch.float32, True, False
    made.text_token_count, made.layer_count, made.embed_count = 64, SMALL["layer_count"], SMALL["embed_count"]
    made.encoder, made.decoder = networks(module, SMALL, TEXT_VOCAB, IMAGE_VOCAB)
    for seed, network in enumerate((made.encoder, made.decoder), start=1):
        state = in_file(network.state_dict())
        seeded.fill(state, seed)  # in place
    made.tokenizer = module.TextTokenizer(*vocabulary())
    return made


class Detokenizer:
    """Keeps the tokens in place of drawing them."""

    def forward(self, is_seamless: bool, image_tokens: Tensor) -> Tensor:
        """A black picture."""
        self.image_tokens = image_tokens.clone()
        return torch.zeros(16, 16, 3)


@torch.no_grad()
def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the fixture."""
    seeded, module = load_seeded(), package()
    made = model(module, seeded)
    states = {side: in_file(getattr(made, side).state_dict()) for side in ("encoder", "decoder")}
    vocab, merges = vocabulary()
    metadata = {
        "small": {side: {key: list(value.shape) for key, value in state.items()} for side, state in states.items()},
        "checksums": {side: seeded.checksum(state) for side, state in states.items()},
        "vocab": vocab,
        "merges": merges,
        "captions": [[text, made.tokenizer.tokenize(text)[1:-1]] for text in captions()],
        "prompt": PROMPT,
        "columns": COLUMNS,
        "samples": [],
        "full": {},
    }
    tensors = teacher_forced(made)
    for index, settings in enumerate(SAMPLES):
        made.detokenizer = Detokenizer()
        with warnings.catch_warnings():  # torch.cuda.amp.autocast is deprecated, and CUDA may not be there
            warnings.simplefilter("ignore")
            made.generate_image(PROMPT, **settings)
        name = f"sampled_{index}"
        tensors[name] = made.detokenizer.image_tokens.short()
        metadata["samples"].append({"name": name, "prompt": PROMPT, "bos_id": 16383, **settings})
    for name, (sizes, text_vocab, image_vocab) in FULL.items():
        with torch.device("meta"):
            pair = networks(module, sizes, text_vocab, image_vocab)
        full = metadata["full"][name] = {}
        for side, network in zip(("encoder", "decoder"), pair, strict=True):
            state = network.state_dict()
            full[side] = {"parameters": sum(value.numel() for value in state.values()), "tensors": len(state)}
    return tensors, {key: json.dumps(value) for key, value in metadata.items()}


def teacher_forced(made) -> dict[str, Tensor]:
    """Outputs for the prompt and for no prompt, in min-dalle's order: first without."""
    tokens = made.tokenizer.tokenize(PROMPT)
    text = torch.ones(2, 64, dtype=torch.long)
    text[0, :2] = torch.tensor([tokens[0], tokens[-1]])
    text[1, : len(tokens)] = torch.tensor(tokens)
    memory = made.encoder(text)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(IMAGE_VOCAB, (1, 256), generator=generator)
    logits, _ = made.decoder(
        attention_mask=text.not_equal(1)[:, None, None, :],
        encoder_state=memory,
        attention_state=torch.zeros(SMALL["layer_count"], 4, 256, SMALL["embed_count"]),
        prev_tokens=torch.cat([torch.full((1, 1), 16384), image[:, :-1]], dim=1),
        token_index=torch.arange(256),
    )
    return {
        "text_tokens": text.short(),
        "memory": memory[:, :20, ::4],
        "image_tokens": image.short(),
        "logits": logits[..., COLUMNS],
        "log_sum_exp": logits[..., :IMAGE_VOCAB].logsumexp(dim=-1),
        "best": logits[..., :IMAGE_VOCAB].argmax(dim=-1).short(),
    }


if __name__ == "__main__":
    recorded, notes = record()
    save_file(
        {key: tensor.contiguous() for key, tensor in recorded.items()},
        Path(__file__).with_suffix(".safetensors"),
        metadata=notes,
    )
