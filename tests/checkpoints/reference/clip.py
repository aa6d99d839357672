"""Outputs of the CLIPs of OpenAI, open_clip (with timm) and transformers, and of SigLIP's text tokenizer.

    git clone https://github.com/openai/CLIP openai_clip            # recorded at d05afc4
    git clone https://github.com/mlfoundations/open_clip            # recorded at 89fb801
    pip install --no-deps --target peers timm==1.0.28 sentencepiece==0.2.3 protobuf==7.36.2
    export PYTHONPATH=openai_clip:open_clip/src:peers               # transformers 5.23.0, ftfy, regex as installed
    python -P tests/checkpoints/reference/clip.py  # writes clip.safetensors beside; -P: this file is no package "clip"

torchvision, which two of them import for their data loading, is replaced by empty classes.
"""

import contextlib
import importlib.util
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
TOKENS = [[98, 5, 17, 3, 99, 0, 0, 0], [98, 99, 0, 0, 0, 0, 0, 0], [98, 41, 8, 30, 2, 77, 50, 99]]
"""Text of a CLIP with 100 ids: start 98, end 99, padding 0."""
SIGLIP_TOKENS = [[5, 17, 3, 1, 1, 1], [1, 1, 1, 1, 1, 1], [41, 8, 30, 2, 77, 1]]
"""Text of a SigLIP: end and padding 1."""
STRINGS = [
    "A Red apple, on_a table!",
    "don't  stop",
    "",
    "!!!",
    "naïve café №½",
    "\uff46\uff55\uff4c\uff4c width",
    "<pad> a\tb\nc",
    "a photo of a cat " * 20,
]
CAPTIONS = """a red apple on a table
small shaded orange circle rotated clockwise
smiling face with heart eyes noto style
a photo of a cat and a dog playing in the snow
an illustration of a baby daikon radish in a tutu walking a dog
a painting of a fox sitting in a field at sunrise
eine rote tür naïve café"""


class Names(type):
    """A class with every constant, each its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class Empty(ModuleType):
    """A module any name of which is an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Names(name, (), {"__init__": lambda self, *_, **__: None})


class EmptyFinder:
    """Finds torchvision."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None  # pyrefly: ignore

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextlib.contextmanager
def without_torchvision() -> Iterator[None]:
    """The empty one in its place for a while."""
    finder: Any = EmptyFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def _seeded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seeded", HERE / "seeded.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def normalised(side: int) -> Tensor:
    """Two pictures as a tower sees them; the same anywhere, so no fixture holds them."""
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 4 - 2


def fill(state: dict[str, Tensor]) -> None:
    """The numbers of all models here; variances are positive."""
    _seeded().fill(state, seed=0)
    for key, tensor in state.items():
        if key.endswith("running_var"):
            tensor.abs_().add_(0.5)


def stored(notes: dict[str, str], name: str) -> dict[str, Tensor]:
    """The weights of a case under its source's names, without its package."""
    integers = json.loads(notes[f"{name}.integers"])
    state = {
        key: torch.zeros(shape, dtype=torch.int64 if key in integers else torch.float32)
        for key, shape in json.loads(notes[f"{name}.shapes"]).items()
    }
    fill(state)
    assert _seeded().checksum(state) == notes[f"{name}.checksum"]
    return state


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Fill a model."""
    state = model.state_dict()
    fill(state)
    model.eval()
    return state


def openai(**sizes: Any) -> nn.Module:
    from clip.model import CLIP

    common = {"embed_dim": 16, "context_length": 8, "vocab_size": 100, "transformer_width": 64, "transformer_heads": 1,
              "transformer_layers": 2}  # fmt: skip
    return CLIP(**{**common, **sizes})


def openai_vit() -> tuple[nn.Module, dict[str, Any]]:
    return openai(image_resolution=32, vision_layers=2, vision_width=128, vision_patch_size=8), {}


def openai_resnet() -> tuple[nn.Module, dict[str, Any]]:
    return openai(image_resolution=64, vision_layers=(2, 1, 1, 1), vision_width=8, vision_patch_size=None), {}


OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16, "mlp_ratio": 2.0},
    "text_cfg": {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}
OPEN_CLIP_SIGLIP: dict[str, Any] = {
    "embed_dim": 48,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 6,
        "vocab_size": 100,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 48,
        "heads": 4,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    },
}


def open_clip() -> tuple[nn.Module, dict[str, Any]]:
    from open_clip.model import CLIP

    return CLIP(**OPEN_CLIP), OPEN_CLIP


def open_clip_custom() -> tuple[nn.Module, dict[str, Any]]:
    from open_clip.model import CustomTextCLIP

    config = {**OPEN_CLIP, "quick_gelu": True}
    return CustomTextCLIP(**config), {**config, "custom_text": True}


def open_clip_siglip() -> tuple[nn.Module, dict[str, Any]]:
    from open_clip.model import CustomTextCLIP

    config = {key: value for key, value in OPEN_CLIP_SIGLIP.items() if key != "custom_text"}
    small = {"img_size": 32, "embed_dim": 48, "depth": 2}  # 12 heads and patches of 16 stay
    vision = {**config["vision_cfg"], "timm_model_kwargs": small}
    return CustomTextCLIP(**{**config, "vision_cfg": vision}), OPEN_CLIP_SIGLIP


def transformers_clip() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=16,
        text_config={
            **tower,
            "vocab_size": 100,
            "max_position_embeddings": 8,
            "eos_token_id": 99,
            "hidden_act": "gelu",
        },
        vision_config={**tower, "image_size": 32, "patch_size": 16, "hidden_act": "quick_gelu"},
    )
    return CLIPModel(config), config.to_dict()


def transformers_siglip() -> tuple[nn.Module, dict[str, Any]]:
    from transformers import SiglipConfig, SiglipModel

    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**tower, "vocab_size": 100, "max_position_embeddings": 6},
        vision_config={**tower, "image_size": 36, "patch_size": 16},  # 4 pixels are left over
    )
    return SiglipModel(config), config.to_dict()


SIDES = {"openai_resnet": 64, "transformers_siglip": 36}
"""Pixels; 32 in the others."""
CASES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    function.__name__: function
    for function in (
        transformers_clip,
        transformers_siglip,
        openai_vit,
        openai_resnet,
        open_clip,
        open_clip_custom,
        open_clip_siglip,
    )
}


@torch.no_grad()
def run(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Inputs and unit features of one case, and how its weights are called."""
    model, config = CASES[name]()
    state = weights(model)
    side = SIDES.get(name, 32)
    pixels = normalised(side)
    tokens = torch.tensor(SIGLIP_TOKENS if "siglip" in name else TOKENS)
    if name.startswith("transformers"):
        text, image = model.get_text_features(tokens), model.get_image_features(pixels)
        text, image = text.pooler_output, image.pooler_output
    else:
        text, image = model.encode_text(tokens), model.encode_image(pixels)
    tensors = {key: found / found.norm(dim=1, keepdim=True) for key, found in (("text", text), ("image", image))}
    notes = {
        "side": str(side),
        "shapes": json.dumps({key: list(tensor.shape) for key, tensor in state.items()}),
        "integers": json.dumps([key for key, tensor in state.items() if not tensor.is_floating_point()]),
        "config": json.dumps(config),
        "checksum": _seeded().checksum(state),
    }
    return (
        {f"{name}.tokens": tokens, **{f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}},
        {f"{name}.{key}": note for key, note in notes.items()},
    )


def siglip_text() -> dict[str, str]:
    """A small vocabulary as ``tokenizer.json``, and what SiglipTokenizer makes of strings with its spiece.model."""
    import sentencepiece
    from transformers import SiglipTokenizer, T5Tokenizer

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS.splitlines() * 3), model_writer=model, vocab_size=90, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spiece.model").write_bytes(model.getvalue())
        slow = SiglipTokenizer(f"{folder}/spiece.model")
        T5Tokenizer.from_pretrained(folder, extra_ids=0).backend_tokenizer.save(f"{folder}/tokenizer.json")
        content = json.loads((Path(folder) / "tokenizer.json").read_text())
        ids = slow(STRINGS, padding="max_length", max_length=16, truncation=True).input_ids
    content["normalizer"] = {"type": "NFKC"}  # the file's own table has 300 kB and does a little more
    return {"siglip_text.tokenizer": json.dumps(content), "siglip_text.ids": json.dumps(ids)}


def archive(path: Path) -> dict[str, Tensor]:
    """Write OpenAI's small ViT as they did, a traced program with half-precision weights; returns its state dict."""
    from clip.model import convert_weights

    model, _ = openai_vit()
    weights(model)
    convert_weights(model)
    for name, value in (("input_resolution", 32), ("context_length", 8), ("vocab_size", 100)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    pixels, tokens = torch.rand(1, 3, 32, 32), torch.tensor(TOKENS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, (pixels, tokens), check_trace=False)
        torch.jit.save(traced, str(path))
    return traced.state_dict()


@torch.no_grad()
def compare(clip: Any, recorded: tuple[dict[str, Tensor], dict[str, str]], name: str, tolerance: float = 1e-6) -> None:
    """Assert that an imported ranker frames texts and gives features as the package did."""
    tensors, notes = recorded
    tokens = tensors[f"{name}.tokens"]
    marks = (1,) if "siglip" in name else (98, 99)
    bare = torch.where(torch.isin(tokens, torch.tensor((0, *marks))), 0, tokens + clip.config.token_shift)
    bare = bare[:, :-1] if "siglip" in name else bare[:, 1:-1]
    framed, _ = clip.frame(bare)
    assert torch.equal(
        torch.where(framed == clip.config.pad_id, 0, framed), torch.where(tokens == clip.config.pad_id, 0, tokens)
    )
    image = clip.image(normalised(int(notes[f"{name}.side"]))).float()
    torch.testing.assert_close(
        torch.nn.functional.normalize(image, dim=-1), tensors[f"{name}.image"], atol=tolerance, rtol=0
    )
    torch.testing.assert_close(clip.encode_text(bare), tensors[f"{name}.text"], atol=tolerance, rtol=0)


def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """All that the fixture holds."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer  # noqa: F401 (see that there is no torchvision)

    torch.set_num_threads(1)
    notes: dict[str, str] = {"strings": json.dumps(STRINGS), **siglip_text()}
    tensors: dict[str, Tensor] = {}
    with without_torchvision():
        from clip import tokenize

        notes["openai_text.ids"] = json.dumps(tokenize(STRINGS, truncate=True).tolist())
        for name in CASES:
            found, said = run(name)
            tensors |= found
            notes |= said
    return tensors, notes


if __name__ == "__main__":
    recorded, metadata = record()
    save_file(recorded, HERE / "clip.safetensors", metadata=metadata)
