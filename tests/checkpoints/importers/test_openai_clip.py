"""OpenAI's CLIPs: outputs of their package, their archives, and files that are none."""

import json
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_pytorch.checkpoints.checkpoint import assemble
from dalle_pytorch.checkpoints.importers import openai_clip
from dalle_pytorch.models.pretrained_clip import PretrainedCLIP, PretrainedCLIPConfig
from dalle_pytorch.models.skeleton import skeleton

CASES = ("openai_vit", "openai_resnet")
SCALARS = {"input_resolution": 32, "context_length": 8, "vocab_size": 100}


@pytest.fixture(scope="session")
def script(reference_script):
    return reference_script("clip")


@pytest.fixture(scope="session")
def record(recorded):
    return recorded("clip")


@pytest.fixture
def vit(script, record) -> dict[str, Tensor]:
    """Weights of the small vision transformer under OpenAI's names."""
    return script.stored(record[1], "openai_vit")


def import_(path: Path) -> PretrainedCLIP:
    head, state = openai_clip.convert(path)
    return assemble(head, state, path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", CASES)
def test_features_are_the_packages(tmp_path, script, record, name, suffix):
    state, path = script.stored(record[1], name), tmp_path / f"clip{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    script.compare(import_(path), record, name)


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What OpenAI's ``convert_weights`` does: all but norms, embeddings and the scale."""
    return {
        key: tensor if any(part in key for part in ("embedding", "ln_", "logit_scale")) else tensor.half()
        for key, tensor in state.items()
    }


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_an_archive_of_halves_is_read(tmp_path, script, record, vit, archive):
    """As released: TorchScript, matrices in half precision, norms and embeddings in single, sizes as scalars."""
    scalars = {name: torch.tensor(value) for name, value in SCALARS.items()}
    path = tmp_path / "ViT.pt"
    archive({**halved(vit), **scalars}, path)
    _, state = openai_clip.convert(path)
    assert {state["text.norm.weight"].dtype, state["text.blocks.0.qkv.weight"].dtype} == {torch.float32, torch.half}
    script.compare(import_(path), record, "openai_vit", tolerance=2e-3)


def test_a_model_of_mixed_types_works_as_it_is(tmp_path, script, record, vit):
    torch.save(halved(vit), tmp_path / "a.pt")
    head, state = openai_clip.convert(tmp_path / "a.pt")
    clip = assemble(head, state, tmp_path / "a.pt", dtype=None)
    assert {parameter.dtype for parameter in clip.parameters()} == {torch.half, torch.float32}
    script.compare(clip, record, "openai_vit", tolerance=5e-3)


def test_the_tokenizer_comes_with_its_vocabulary(tmp_path, vit, record):
    """Of 49,408 ids; framed, its text tokens are those of ``clip.tokenize``, cut ones too."""
    torch.save(vit, tmp_path / "a.pt")
    assert import_(tmp_path / "a.pt").text_tokenizer is None
    vit["token_embedding.weight"] = torch.randn(49_408, 64)
    torch.save(vit, tmp_path / "b.pt")
    clip = import_(tmp_path / "b.pt")
    clip.config.context_len = 77
    strings, ids = json.loads(record[1]["strings"]), json.loads(record[1]["openai_text.ids"])
    tokens = clip.text_tokenizer.tokenize(strings, clip.config.text_len, truncate=True)
    assert clip.frame(tokens)[0].tolist() == ids
    assert 0 not in ids[-1]  # one of them is cut


def keys(width: int, layers: int, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a transformer under OpenAI's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(layers):
        start = f"{prefix}transformer.resblocks.{block}."
        matrices = (("attn.in_proj_", 3, 1), ("attn.out_proj.", 1, 1), ("mlp.c_fc.", 4, 1), ("mlp.c_proj.", 1, 4))
        for name, out, into in matrices:
            shapes |= {f"{start}{name}weight": (out * width, into * width), f"{start}{name}bias": (out * width,)}
        shapes |= {f"{start}ln_{n}.{end}": (width,) for n in (1, 2) for end in ("weight", "bias")}
    return shapes


def text_keys(width: int, embed_dim: int) -> dict[str, tuple[int, ...]]:
    return {
        **dict.fromkeys(("input_resolution", "context_length", "vocab_size", "logit_scale"), ()),
        "positional_embedding": (77, width),
        "token_embedding.weight": (49_408, width),
        "text_projection": (width, embed_dim),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        **keys(width, 12, ""),
    }


def resnet_keys() -> dict[str, tuple[int, ...]]:
    """RN50's image tower."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(start: str, conv: str, norm: str, into: int, out: int, side: int) -> None:
        shapes[f"{start}{conv}.weight"] = (out, into, side, side)
        names = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"{start}{norm}.{name}": (out,) for name in names}, **{f"{start}{norm}.num_batches_tracked": ()})

    for number, into, out in ((1, 3, 32), (2, 32, 32), (3, 32, 64)):
        convolution("visual.", f"conv{number}", f"bn{number}", into, out, 3)
    into = 64
    for layer, blocks in enumerate((3, 4, 6, 3), 1):
        inner = 32 * 2**layer
        for block in range(blocks):
            start = f"visual.layer{layer}.{block}."
            convolution(start, "conv1", "bn1", into, inner, 1)
            convolution(start, "conv2", "bn2", inner, inner, 3)
            convolution(start, "conv3", "bn3", inner, 4 * inner, 1)
            if block == 0:
                convolution(start, "downsample.0", "downsample.1", into, 4 * inner, 1)
            into = 4 * inner
    shapes["visual.attnpool.positional_embedding"] = (50, 2048)
    for name, out in (("q", 2048), ("k", 2048), ("v", 2048), ("c", 1024)):
        shapes |= {f"visual.attnpool.{name}_proj.weight": (out, 2048), f"visual.attnpool.{name}_proj.bias": (out,)}
    return shapes


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"), [("ViT-B/32", 302, 151_277_313), ("RN50", 489, 102_007_137)]
)
def test_released_sizes_fit_to_the_last_weight(name, tensors, parameters):
    """On the meta device: nothing is left over or missing, and a ViT-B/32 is what the config's defaults describe."""
    shapes = text_keys(512, 512 if name == "ViT-B/32" else 1024)
    if name == "ViT-B/32":
        shapes |= {
            "visual.class_embedding": (768,),
            "visual.positional_embedding": (50, 768),
            "visual.proj": (768, 512),
        }
        shapes |= {f"visual.ln_{at}.{end}": (768,) for at in ("pre", "post") for end in ("weight", "bias")}
        shapes |= {"visual.conv1.weight": (768, 3, 32, 32), **keys(768, 12, "visual.")}
    else:
        shapes |= resnet_keys()
    assert len(shapes) == tensors + 3
    head, state = openai_clip.from_state({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    config = PretrainedCLIPConfig(**head["config"])
    assert config == PretrainedCLIPConfig() or name == "RN50"
    with skeleton():
        clip = PretrainedCLIP(config)
    assert {key: tensor.shape for key, tensor in clip.state_dict().items()} == {k: t.shape for k, t in state.items()}
    assert sum(parameter.numel() for parameter in clip.parameters()) == parameters
    assert head["text_tokenizer"] == {"kind": "clip"}


def test_no_weight_is_guessed_or_dropped(tmp_path, vit):
    path = tmp_path / "clip.pt"
    torch.save({**vit, "visual.transformer.resblocks.0.gate": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"clip.pt: weights left over.*visual.transformer.resblocks.0.gate"):
        import_(path)
    torch.save({key: tensor for key, tensor in vit.items() if "resblocks.0.ln_1.bias" not in key}, path)
    with pytest.raises(ValueError, match=r"clip.pt: .*missing (image|text).blocks.0.norm1.bias"):
        import_(path)
    torch.save({key: tensor for key, tensor in vit.items() if key != "visual.positional_embedding"}, path)
    with pytest.raises(ValueError, match=r"clip.pt: a weight is missing: image.positions"):
        import_(path)


def test_other_files_are_refused_in_a_line(tmp_path, vit, script, record):
    path = tmp_path / "clip.pt"
    torch.save(vit, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"^\S+clip.pt cannot be read: truncated[^\n]*$"):
        import_(path)
    torch.save(script.stored(record[1], "transformers_clip"), path)
    with pytest.raises(ValueError, match=r"^\S+clip.pt: not a CLIP of OpenAI[^\n]*$"):
        import_(path)
    with pytest.raises(FileNotFoundError, match=r"other.pt"):
        import_(tmp_path / "other.pt")


@pytest.mark.live
def test_the_packages_say_the_same_today(tmp_path, script, record):
    """All that the fixture holds, for the other two importers too; and an archive traced by OpenAI's own program."""
    if missing := [name for name in ("clip", "open_clip", "timm", "sentencepiece") if find_spec(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    tensors, notes = script.record()
    for key, tensor in record[0].items():
        torch.testing.assert_close(tensors[key], tensor, atol=1e-5, rtol=0)
    assert json.loads(notes["siglip_text.ids"]) == json.loads(record[1]["siglip_text.ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = script.archive(tmp_path / "ViT.pt")
    assert state["visual.proj"].dtype == torch.half
    script.compare(import_(tmp_path / "ViT.pt"), record, "openai_vit", tolerance=2e-3)
