"""Record what minDALL-E makes of seeded weights: logits, greedy tokens, codes, pixels, text ids, sizes of the 1.3B.

Its package cannot be imported as a whole on Python 3.11; the modules of its networks can, with einops and omegaconf:

    git clone https://github.com/kakaobrain/minDALL-E   # e548007
    PYTHONPATH=minDALL-E python -P tests/checkpoints/reference/mindalle.py
"""

import contextlib
import importlib
import importlib.util
import io
import json
import sys
import tempfile
import types
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

STAGE1 = {"double_z": False, "z_channels": 8, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
          "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8], "pdrop": 0.0}  # fmt: skip
STAGE2 = {"embed_dim": 32, "n_layers": 2, "n_heads": 4, "n_dense_layers": 2, "ctx_len_img": 64, "ctx_len_txt": 6,
          "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "mlp_bias": True, "attn_bias": True,
          "gelu_use_approx": False}  # fmt: skip
RELEASED = {**STAGE2, "embed_dim": 1536, "n_layers": 42, "n_heads": 24, "n_dense_layers": 42, "ctx_len_img": 256,
            "ctx_len_txt": 64}  # fmt: skip
CODES, TEXT_IDS = 20, 24
MERGES = ["a t</w>", "c at</w>", "r e", "re d</w>"]
LETTERS = ["a</w>", "t</w>", "d</w>", "a", "c", "t", "r", "e", "d", "at</w>", "cat</w>", "re", "red</w>", ".</w>"]
VOCABULARIES = {
    "unk_first": ["[UNK]", "[PAD]", *LETTERS],
    "pad_first": ["[PAD]", "[UNK]", *LETTERS],
    "letter_first": [*LETTERS, "[UNK]"],  # [PAD] is added
}
CAPTIONS = ["a red cat", "A  Réd cat.", "", "tar crate", "a ☃"]


def import_networks() -> types.SimpleNamespace:
    """Its modules, without what its packages import."""
    root = next(Path(p) for p in sys.path if (Path(p) / "dalle" / "models" / "stage2").is_dir())
    for name in ("dalle", "dalle.models", "dalle.models.stage1", "dalle.models.stage2", "dalle.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules[name] = package
    return types.SimpleNamespace(
        VQGAN=importlib.import_module("dalle.models.stage1.vqgan").VQGAN,
        Transformer1d=importlib.import_module("dalle.models.stage2.transformer").Transformer1d,
        build_tokenizer=importlib.import_module("dalle.models.tokenizer").build_tokenizer,
        sampling=importlib.import_module("dalle.utils.sampling").sampling,
    )


def load_seeded():
    """The script beside this one."""
    spec = importlib.util.spec_from_file_location("seeded", Path(__file__).with_name("seeded.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sizes_of(state: dict[str, Tensor]) -> dict[str, list[int]]:
    """Shapes, for a header."""
    return {key: list(tensor.shape) for key, tensor in state.items()}


def text_ids(build_tokenizer) -> dict[str, dict]:
    """Ids of captions, filled up with [PAD], for several orders of the vocabulary."""
    found = {}
    for name, symbols in VOCABULARIES.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
            (Path(folder) / "bpe-16k-vocab.json").write_text(json.dumps(vocabulary))
            (Path(folder) / "bpe-16k-merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
            tokenizer = build_tokenizer(folder, context_length=6, lowercase=True, dropout=None)
        ids = {caption: tokenizer.encode(caption).ids for caption in CAPTIONS}
        found[name] = {"vocabulary": vocabulary, "merges": MERGES, "pad": tokenizer.token_to_id("[PAD]"), "ids": ids}
    return found


@torch.no_grad()
def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the fixture."""
    from omegaconf import OmegaConf

    nets, seeded, generator = import_networks(), load_seeded(), torch.Generator().manual_seed(0)
    vqgan = nets.VQGAN(n_embed=CODES, embed_dim=6, hparams=OmegaConf.create(STAGE1)).eval()
    transformer = nets.Transformer1d(TEXT_IDS, CODES, types.SimpleNamespace(**STAGE2)).eval()
    seeded.fill(vqgan.state_dict())
    seeded.fill(transformer.state_dict())
    images = torch.randint(256, (2, 3, 16, 16), generator=generator).byte()
    tokens = vqgan.get_codes(2 * (images / 255) - 1)
    text = torch.tensor([[3, 9, 4, 1, 1, 1], [2, 5, 23, 0, 7, 11]])  # [PAD] is 1
    places = [torch.arange(n).expand(2, n) for n in (64, 6)]
    logits_image, logits_text = transformer(tokens, text, *places)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.cuda.amp.autocast's name
        greedy = nets.sampling(transformer, text, top_k=1, is_tqdm=False, use_fp16=False, max_seq_len=64)
    tensors = {
        "images": images,
        "tokens": tokens.byte(),
        "decoded": (vqgan.decode_code(tokens.view(2, 8, 8)) * 0.5 + 0.5).clamp(0, 1),
        "text": text.byte(),
        "logits.image": logits_image,
        "logits.text": logits_text,
        "greedy": greedy.byte(),
    }
    with torch.device("meta"):
        released = nets.Transformer1d(16384, 16384, types.SimpleNamespace(**RELEASED))
    blocks = {key: size for key, size in sizes_of(released.state_dict()).items() if not key.startswith("blocks.")}
    first = {key: size for key, size in sizes_of(released.state_dict()).items() if key.startswith("blocks.0.")}
    metadata = {
        "stage1": sizes_of(vqgan.state_dict()),
        "stage2": sizes_of(transformer.state_dict()),
        "checksums": [seeded.checksum(net.state_dict()) for net in (vqgan, transformer)],
        "hparams": {"stage1": STAGE1, "stage2": STAGE2},
        "released": {"shapes": blocks | first, "count": sum(p.numel() for p in released.parameters())},
        "text": text_ids(nets.build_tokenizer),
    }
    return tensors, {name: json.dumps(value) for name, value in metadata.items()}


if __name__ == "__main__":
    recorded, metadata = record()
    save_file(
        {key: tensor.contiguous() for key, tensor in recorded.items()},
        Path(__file__).with_suffix(".safetensors"),
        metadata=metadata,
    )
