"""dalle-mini's Flax files: the same outputs in every layout, and what is wrong with a folder.

There is no JAX here: the files are written from a DALLEBart's weights by the layout that dalle-mini's modules give
(model/modeling.py: parts are counted in the order of use, kernels are [in, out], scanned layers lie on a first axis).
"""

import contextlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_pytorch.checkpoints import flax_reader as flax
from dalle_pytorch.checkpoints import hub
from dalle_pytorch.checkpoints.checkpoint import build, load_state
from dalle_pytorch.checkpoints.importers import flax_dalle_mini as dalle_mini
from dalle_pytorch.checkpoints.importers import torch_min_dalle as min_dalle
from dalle_pytorch.checkpoints.sources import convert
from dalle_pytorch.models.dalle_bart import DALLEBart, DALLEBartConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig

CONFIG = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_vocab_size": 300, "image_vocab_size": 15,
    "max_text_length": 9, "image_length": 16, "decoder_start_token_id": 12, "normalize_text": True,
}  # fmt: skip
VQGAN_SETTINGS = {
    "image_size": 32, "ch": 32, "ch_mult": [1, 1, 2, 1], "num_res_blocks": 1, "attention_levels": [2], "z_channels": 32,
    "embed_dim": 4, "codebook_size": 12, "pixel_range": "zero_to_one",
}  # fmt: skip
TEXT = torch.tensor([[3, 7, 4, 0], [8, 5, 0, 0]])
IMAGE = torch.arange(32).reshape(2, 16) * 5 % 12
Tree = dict[str, Any]


def pack(value: Any) -> bytes:
    """msgpack of a tree, as flax.serialization writes it."""
    if isinstance(value, dict):
        head = bytes([0x80 | len(value)]) if len(value) < 16 else struct.pack(">BH", 0xDE, len(value))
        return head + b"".join(pack(part) for item in value.items() for part in item)
    if isinstance(value, list):
        return bytes([0x90 | len(value)]) + b"".join(map(pack, value))
    if isinstance(value, str):
        text = value.encode()
        return (bytes([0xA0 | len(text)]) if len(text) < 32 else struct.pack(">BB", 0xD9, len(text))) + text
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if value < 0x80 else struct.pack(">BQ", 0xCF, value)
    assert isinstance(value, Tensor)
    name = str(value.dtype).removeprefix("torch.")
    numbers = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return pack_array(pack([*([list(value.shape)]), name])[1:], numbers)


def pack_array(shape_and_name: bytes, numbers: bytes, kind: int = 1) -> bytes:
    """Extension 1: a list of the shape, the name of the dtype and the bytes."""
    size = struct.pack(">BB", 0xC4, len(numbers)) if len(numbers) < 256 else struct.pack(">BI", 0xC6, len(numbers))
    content = b"\x93" + shape_and_name + size + numbers
    if len(content) in (1, 2, 4, 8, 16):
        return bytes([0xD4 + [1, 2, 4, 8, 16].index(len(content)), kind]) + content
    for code, number, most in ((0xC7, "B", 0xFF), (0xC8, "H", 0xFFFF), (0xC9, "I", 0xFFFFFFFF)):
        if len(content) <= most:
            return struct.pack(f">B{number}B", code, len(content), kind) + content
    raise AssertionError


def chunked(tensor: Tensor, size: int = 100) -> Tree:
    """How Flax writes an array of more than 2 ** 30 bytes, at a hundred numbers."""
    shape, pieces = {str(i): side for i, side in enumerate(tensor.shape)}, tensor.flatten().split(size)
    chunks = {str(i): piece for i, piece in enumerate(pieces)}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}


def nest(flat: dict[str, Any]) -> Tree:
    tree: Tree = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def layer_arrays(state: dict[str, Tensor], block: str, *, decoder: bool) -> dict[str, Tensor]:
    """One layer under Flax's names: norm, attention, norm, the same for the caption in the decoder, and the GLU."""
    dim = state[f"{block}.attn_norm.bias"].shape[0]
    q, k, v = state[f"{block}.attention.to_qkv.weight"].split(dim)
    attentions = [{"q": q, "k": k, "v": v, "out": state[f"{block}.attention.to_out.weight"]}]
    norms = [("attn_norm", "attn_post")]
    if decoder:
        k, v = state[f"{block}.cross_attention.to_kv.weight"].split(dim)
        q, out = (state[f"{block}.cross_attention.{name}.weight"] for name in ("to_q", "to_out"))
        attentions.append({"q": q, "k": k, "v": v, "out": out})
        norms.append(("cross_norm", "cross_post"))
    gate, value = state[f"{block}.feed_forward.to_hidden.weight"].chunk(2)
    arrays = {
        "GLU_0.LayerNorm_0.bias": state[f"{block}.feed_forward.norm.bias"],
        "GLU_0.Dense_0.kernel": gate.T,
        "GLU_0.Dense_1.kernel": value.T,
        "GLU_0.LayerNorm_1.bias": state[f"{block}.feed_forward.hidden_norm.bias"],
        "GLU_0.Dense_2.kernel": state[f"{block}.feed_forward.to_out.weight"].T,
    }
    for i, (attention, (before, after)) in enumerate(zip(attentions, norms, strict=True)):
        arrays |= {f"FlaxBartAttention_{i}.{name}_proj.kernel": weight.T for name, weight in attention.items()}
        arrays[f"LayerNorm_{2 * i}.bias"] = state[f"{block}.{before}.bias"]
        arrays[f"LayerNorm_{2 * i + 1}.bias"] = state[f"{block}.{after}.bias"]
        arrays[f"LayerNorm_{2 * i + 1}.scale"] = state[f"{block}.{after}.weight"]
    return arrays


def flax_arrays(bart: DALLEBart, *, scanned: bool) -> dict[str, Tensor]:
    """All of a model under Flax's names."""
    state = {key: tensor.detach() for key, tensor in bart.state_dict().items()}
    arrays = {"lm_head.kernel": state["image_head.weight"].T}
    for side, ours, name in (("encoder", "text", "En"), ("decoder", "image", "De")):
        arrays |= {
            f"model.{side}.embed_tokens.embedding": state[f"{ours}_emb.weight"],
            f"model.{side}.embed_positions.embedding": state[f"{ours}_pos.weight"],
            f"model.{side}.layernorm_embedding.scale": state[f"{ours}_norm.weight"],
            f"model.{side}.layernorm_embedding.bias": state[f"{ours}_norm.bias"],
            f"model.{side}.final_ln.bias": state[f"{side}.norm.bias"],
        }
        count = len(getattr(bart, side).blocks)
        layers = [layer_arrays(state, f"{side}.blocks.{i}", decoder=side == "decoder") for i in range(count)]
        prefix = f"model.{side}.layers.FlaxBart{name}coderLayer"
        if scanned:
            arrays |= {f"{prefix}s.{key}": torch.stack([layer[key] for layer in layers]) for key in layers[0]}
        else:
            arrays |= {f"{prefix}_{i}.{key}": layer[key] for i, layer in enumerate(layers) for key in layer}
    return arrays


def vqgan_arrays(vqgan: VQGAN) -> dict[str, Tensor]:
    """Flax's names of a VQGAN: list entries have their number behind a _, kernels are [h, w, in, out]."""
    arrays = {}
    for key, tensor in vqgan.state_dict().items():
        if key == "codebook.weight":
            arrays["quantize.embedding.embedding"] = tensor
            continue
        for name in ("down", "up", "block", "attn"):
            for i in range(4):
                key = key.replace(f".{name}.{i}.", f".{name}_{i}.")
        kernel = tensor.ndim == 4
        key = key.replace(".weight", ".kernel" if kernel else ".scale")
        arrays[key] = tensor.permute(2, 3, 1, 0) if kernel else tensor
    return arrays


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    torch.manual_seed(1)
    return VQGAN(VQGANConfig(**VQGAN_SETTINGS)).eval()


@pytest.fixture(scope="module")
def bart(vqgan) -> DALLEBart:
    torch.manual_seed(2)
    config = DALLEBartConfig(
        dim=32, encoder_layers=2, decoder_layers=3, heads=2, ffn_dim=24, text_vocab_size=300, text_positions=9,
        image_vocab_size=15, bos_id=12, grid_size=4,
    )  # fmt: skip
    bart = DALLEBart(config, vqgan).eval()
    with torch.no_grad():
        for name, parameter in bart.named_parameters():
            if not name.startswith("vae."):
                parameter += 0.2 * torch.randn_like(parameter)
    return bart


@pytest.fixture(scope="module")
def notes(recorded) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in recorded("dalle_mini")[1].items()}


@pytest.fixture
def write(tmp_path, bart, vqgan, notes) -> Callable[..., Path]:
    """Write a model's folder with its VQGAN in it."""

    def write(arrays: dict[str, Any] | None = None, **settings: Any) -> Path:
        (tmp_path / "vqgan").mkdir(exist_ok=True)
        arrays = flax_arrays(bart, scanned=True) if arrays is None else arrays
        (tmp_path / "flax_model.msgpack").write_bytes(pack(nest(arrays)))
        kept = {name: value for name, value in {**CONFIG, **settings}.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(kept))
        (tmp_path / "vocab.json").write_text(json.dumps(notes["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *notes["merges"], ""]))
        (tmp_path / "vqgan/flax_model.msgpack").write_bytes(pack(nest(vqgan_arrays(vqgan))))
        (tmp_path / "vqgan/config.json").write_text(json.dumps({"resolution": 32, "n_embed": 12}))
        return tmp_path

    return write


def load(converted: tuple[dict[str, Any], dict[str, Tensor]]) -> DALLEBart:
    header, state = converted
    model = build(json.loads(json.dumps(header)))
    load_state(model, state)
    return model.eval()


@pytest.mark.parametrize("scanned", [True, False])
@torch.no_grad()
def test_a_model_comes_back(scanned, write, bart):
    """Weights, config and outputs are those that were written, whichever way the layers lie."""
    again = load(dalle_mini.convert(write(flax_arrays(bart, scanned=scanned))))
    assert again.config == bart.config
    assert again.vae.config == bart.vae.config
    for key, tensor in bart.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    torch.testing.assert_close(again.image_logits(TEXT, IMAGE), bart.image_logits(TEXT, IMAGE))
    torch.testing.assert_close(again.vae.decode(IMAGE), bart.vae.decode(IMAGE))


def test_weights_take_no_more_memory_than_their_own(write):
    """No part keeps its whole stack, and nothing is a view of the file."""
    _, state = dalle_mini.convert(write())
    for name, tensor in state.items():
        assert tensor.is_contiguous(), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_weights_keep_their_dtype(dtype, write, bart):
    arrays = {key: tensor.to(dtype) for key, tensor in flax_arrays(bart, scanned=True).items()}
    again = load(dalle_mini.convert(write(arrays)))
    assert {parameter.dtype for name, parameter in again.named_parameters() if "vae" not in name} == {dtype}
    assert torch.equal(again.image_head.weight, bart.image_head.weight.to(dtype))
    logits = bart.image_logits(TEXT, IMAGE)
    torch.testing.assert_close(
        again.image_logits(TEXT, IMAGE).float(), logits, atol=0.06 * logits.abs().max().item(), rtol=0
    )


@pytest.mark.parametrize("key", ["model.encoder.embed_tokens.embedding", "lm_head.kernel",
                                 "model.decoder.layers.FlaxBartDecoderLayers.GLU_0.Dense_0.kernel"])  # fmt: skip
def test_large_arrays_come_in_pieces(key, write, bart):
    arrays: dict[str, Any] = flax_arrays(bart, scanned=True)
    arrays[key] = chunked(arrays[key])
    _, state = dalle_mini.convert(write(arrays))
    assert all(torch.equal(state[name], tensor) for name, tensor in bart.state_dict().items())


def test_every_tokenizer_file_gives_the_same_ids(write, notes):
    path = write()
    plain = dalle_mini.convert(path)[0]["text_tokenizer"]
    assert plain["normalize"] == "dalle_mini"
    tokenizer = load(dalle_mini.convert(path)).text_tokenizer
    for text, _, _, ids in notes["captions"]:
        assert tokenizer.encode(text) == (ids if ids != [notes["vocab"]["Ġ"]] else [])
    for merges in (notes["merges"], [merge.split(" ") for merge in notes["merges"]]):  # older and newer files
        model = {"type": "BPE", "vocab": notes["vocab"], "merges": merges}
        (path / "tokenizer.json").write_text(json.dumps({"model": model}))
        (path / "vocab.json").unlink(missing_ok=True)
        assert dalle_mini.convert(path)[0]["text_tokenizer"] == plain
    (path / "words.txt").write_text("\n".join(f"{word} 9" for word in notes["words"]))
    again = load(dalle_mini.convert(path, hashtag_words=path / "words.txt")).text_tokenizer
    assert again.clean("#theredapple") == "the red apple"
    (path / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {}}}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: no byte-level BPE"):
        dalle_mini.convert(path)


@torch.no_grad()
def test_any_file_of_the_vqgan_will_do(write, tmp_path, vqgan):
    path = write()
    expected = vqgan.decode(IMAGE)
    taming = {
        ("quantize.embedding.weight" if key == "codebook.weight" else key): tensor
        for key, tensor in vqgan.state_dict().items()
    }
    torch.save({"state_dict": taming}, tmp_path / "vqgan.ckpt")
    (path / "vqgan").rename(path / "elsewhere")
    header, state = dalle_mini.convert_vqgan(path / "vqgan.ckpt", norm_eps=1e-6)
    assert header["config"]["pixel_range"] == "zero_to_one"
    assert all(torch.equal(state[key], tensor) for key, tensor in vqgan.state_dict().items())
    torch.testing.assert_close(load(dalle_mini.convert(path, vqgan=path / "elsewhere")).vae.decode(IMAGE), expected)
    taming["embedding.weight"] = taming.pop("quantize.embedding.weight")
    detoker = {key: tensor for key, tensor in taming.items() if not key.startswith(("encoder.", "quant_conv."))}
    torch.save(detoker, tmp_path / "detoker.pt")
    header, state = dalle_mini.convert_vqgan(path / "detoker.pt", norm_eps=1e-5)
    assert (header["config"]["encoder"], header["config"]["norm_eps"]) == (False, 1e-5)
    assert torch.equal(state["codebook.weight"], vqgan.codebook.weight)
    with pytest.raises(ValueError, match=r"vqgan: no VQGAN here: vqgan= names its folder"):
        dalle_mini.convert(path)
    (path / "elsewhere/config.json").write_text('{"double_z": true}')
    with pytest.raises(ValueError, match=r"config\.json: double_z is True; only False can be imported"):
        dalle_mini.convert(path, vqgan=path / "elsewhere")


def test_the_vqgan_may_be_on_the_hub(write, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda name: asked.append(name) or tmp_path / "vqgan")
    header, _ = convert(write(), "dalle_mini", vqgan="dalle-mini/vqgan_imagenet_f16_16384")
    assert asked == ["dalle-mini/vqgan_imagenet_f16_16384"]
    assert header["vae"]["config"]["pixel_range"] == "zero_to_one"


def test_config_without_optional_fields_has_dalle_minis_defaults(write, bart):
    left_out = dict.fromkeys(["d_model", "encoder_layers", "decoder_start_token_id"])
    header, _ = dalle_mini.convert(write(**left_out))
    assert (header["config"]["dim"], header["config"]["bos_id"]) == (32, 15)  # image_vocab_size, as there


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ln_type": "rmsnorm"}, "ln_type is 'rmsnorm'; only 'layernorm' can be imported"),
        ({"ln_positions": "swinv2"}, "ln_positions is 'swinv2'; only 'normformer'"),
        ({"ln_positions": "deepnet"}, "ln_positions is 'deepnet'"),
        ({"use_deepnet_scaling": True}, "use_deepnet_scaling is True; only False"),
        ({"use_bias": True}, "use_bias is True"),
        ({"use_glu": False}, "use_glu is False"),
        ({"use_alibi": True}, "use_alibi is True"),
        ({"use_head_scale": True}, "use_head_scale is True"),
        ({"use_cosine_attention": True}, "use_cosine_attention is True"),
        ({"use_swin_position_embeddings": True}, "use_swin_position_embeddings is True"),
        ({"use_absolute_position_embeddings": False}, "use_absolute_position_embeddings is False"),
        ({"use_final_ln_encoder": False}, "use_final_ln_encoder is False"),
        ({"force_ln_scale": True}, "force_ln_scale is True"),
        ({"sinkhorn_iters": 3}, "sinkhorn_iters is 3; only 1"),
        ({"scale_embedding": True}, "scale_embedding is True"),
        ({"activation_function": "smelu"}, "activation_function is 'smelu'; only 'gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"normalize_text": None}, "normalize_text is False; only True"),
        ({"decoder_attention_heads": 4}, r"encoder_attention_heads and decoder_attention_heads are \[2, 4\]"),
        ({"decoder_ffn_dim": None}, r"encoder_ffn_dim and decoder_ffn_dim are \[24, 4096\]"),
        ({"d_model": 64}, "d_model = 64, but 32 by the weights"),
        ({"decoder_layers": 2}, "decoder_layers = 2, but 3 by the weights"),
    ],
)
def test_other_variants_are_named(settings, message, write):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}") as caught:
        dalle_mini.convert(write(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model.encoder.layers.FlaxBartEncoderLayers.LayerNorm_2.bias": torch.zeros(2, 32)},
         r"msgpack: weights left over.*layers\.0\.pre_encoder_attn_layer_norm\.bias"),
        ({"model.decoder.rel_bias.embedding": torch.zeros(2, 32)}, r"msgpack: weights left over.*rel_bias\.weight"),
        ({"encoder.conv_in.kernel": torch.zeros(2)}, r"msgpack: no weights of a dalle-mini.* encoder\.conv_in"),
        ({"model.decoder.final_ln.scale": torch.full((32,), 2.0)}, r"msgpack: trained scales.*final_ln\.weight"),
        ({"model.encoder.embed_positions.embedding": None}, r"msgpack: .*lacks embed_positions\.weight"),
        ({"model.encoder.layers.FlaxBartEncoderLayers.FlaxBartAttention_0.v_proj.kernel": None},
         r"msgpack: 1 of the 3 parts of encoder\.blocks\.0\.attention\.to_qkv\.weight are missing"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(changed, message, write, bart):
    arrays = {**flax_arrays(bart, scanned=True), **changed}
    with pytest.raises(ValueError, match=message) as caught:
        dalle_mini.convert(write({key: tensor for key, tensor in arrays.items() if tensor is not None}))
    assert "\n" not in str(caught.value)


def test_a_missing_weight_is_named(write, bart):
    arrays = flax_arrays(bart, scanned=False)
    del arrays["model.decoder.layers.FlaxBartDecoderLayer_1.LayerNorm_3.scale"]
    header, state = dalle_mini.convert(write(arrays))
    with pytest.raises(ValueError, match=r"missing decoder\.blocks\.1\.cross_post\.weight, left over none"):
        load_state(build(header), state)


def test_files_that_are_missing_are_named(write):
    path = write()
    for name in ("merges.txt", "vocab.json", "flax_model.msgpack", "config.json"):
        (path / name).unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            dalle_mini.convert(path)


def test_min_dalles_files_of_the_same_weights_are_the_same_model(write, bart):
    """Both importers end in one table."""
    arrays = flax.read(write() / "flax_model.msgpack")
    encoder, decoder = dalle_mini.split(Path("x"), arrays)
    assert not arrays
    assert decoder["layers.2.encoder_attn.out_proj.weight"].shape == (32, 32)
    assert torch.equal(
        decoder["layers.2.encoder_attn.v_proj.weight"], bart.decoder.blocks[2].cross_attention.to_kv.weight[32:]
    )
    config, _ = min_dalle.assemble(encoder, decoder, ("e", "d"), bos_id=12, heads=2)
    assert config == bart.config


def test_arrays_of_every_kind_are_read_back(tmp_path):
    """Shapes, dtypes and lengths around the borders of msgpack's codes."""
    generator = torch.Generator().manual_seed(0)
    arrays: dict[str, Tensor] = {}
    for name in flax.DTYPES:
        dtype = getattr(torch, name)
        for shape in ((), (1,), (3,), (2, 5), (0, 4), (257,), (70_000,)):
            numbers = torch.randint(0, 2, shape, generator=generator)
            arrays[f"deep.er.{name}.{'x'.join(map(str, shape)) or 'scalar'}"] = numbers.to(dtype)
    many = {f"{'n' * 40}{i}": torch.full((i % 7,), i, dtype=torch.int64) for i in range(40)}
    path = tmp_path / "a.msgpack"
    path.write_bytes(pack(nest({**arrays, **many})))
    found = flax.read(path)
    assert found.keys() == {**arrays, **many}.keys()
    path.write_bytes(b"\xdf\x00\x00\x00\x01" + pack("a") + pack(torch.ones(3)))  # a map with a length of 4 bytes
    assert torch.equal(flax.read(path)["a"].read(), torch.ones(3))
    path.write_bytes(pack(nest({**arrays, **many})))
    for key, tensor in {**arrays, **many}.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key].read(), tensor), key


def test_msgpack_itself_reads_the_files_of_these_tests(write):
    msgpack = pytest.importorskip("msgpack")
    path = write() / "flax_model.msgpack"

    def array(kind: int, content: bytes) -> Tensor:
        shape, name, numbers = msgpack.unpackb(content)
        assert (kind, name) == (1, "float32")
        return torch.frombuffer(bytearray(numbers), dtype=torch.float32).view(*shape)

    def flatten(tree: Tree, prefix: str = "") -> dict[str, Tensor]:
        parts = {}
        for key, value in tree.items():
            parts |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return parts

    theirs = flatten(msgpack.unpackb(path.read_bytes(), ext_hook=array, max_ext_len=2**31 - 1))
    ours = flax.read(path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].read(), tensor) for key, tensor in theirs.items())
    values = [
        None,
        True,
        False,
        -1,
        -33,
        200,
        70_000,
        2**40,
        -(2**40),
        1.5,
        [1, [2]],
        b"bytes",
        list(range(20)),
        "é" * 300,
    ]
    for value in values:  # all are understood, and refused: none is an array
        path.write_bytes(msgpack.packb({"a": value, "b": {str(i): value for i in range(17)}}))
        with pytest.raises(ValueError, match=r"a is .*no array"):
            flax.read(path)


def test_every_truncation_is_noticed(tmp_path):
    whole = pack(nest({"a.b": torch.arange(5.0), "a.c": torch.ones(30), "d": torch.ones((), dtype=torch.bfloat16)}))
    path = tmp_path / "short.msgpack"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"short\.msgpack cannot be read: truncated, or not msgpack") as caught:
            flax.read(path)
        assert "\n" not in str(caught.value)


def test_no_bytes_do_anything_else(tmp_path):
    """Changed bytes are refused or give other numbers; nothing else can come of them."""
    whole, rng = pack(nest({"a.b": torch.arange(5.0), "c": chunked(torch.ones(7, 3), 10)})), random.Random(0)
    path = tmp_path / "changed.msgpack"
    refused = []
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(ValueError):
            refused.append(content)
            for array in flax.read(path).values():
                array.read()
            refused.pop()
    assert 100 < len(refused) < 400  # many a changed byte is a number's


def test_other_content_is_named(tmp_path):
    path = tmp_path / "other.msgpack"
    array = pack([[2], "float32"])[1:]
    cases = {
        b"\x93\x01\x02\x03": "not weights of Flax: it is no single map",
        pack({"a": torch.ones(1)}) + b"\x00": "it is no single map",
        pack({"a": "text"}): "a is 'text', no array",
        b"\x81\x01\x02": "a map has the key 1",
        b"\x82\xa1a\xc0\xa1a\xc0": "a map has the key 'a', or has it twice",
        b"\x81\xa1a\xc1": "not msgpack",
        b"\x81\xa1a" * 40 + b"\xc0": "nested more than 32 deep",
        b"\x81\xa1a" + pack_array(array, bytes(8), kind=2): "an extension of type 2",
        b"\x81\xa1a" + pack_array(array, bytes(8), kind=77): "an extension of type 77",
        b"\x81\xa1a" + pack_array(array, bytes(7)): "damaged: an array's shape and bytes do not fit",
        b"\x81\xa1a" + pack_array(pack([[2], "object"])[1:], bytes(8)): "an array of type object, known are float64",
        pack({"a": {**chunked(torch.ones(300)), "shape": {"0": 301}}}): "the pieces of a do not make up its shape",
        pack({"a": {**chunked(torch.ones(300)), "chunks": {}}}): "the pieces of a do not make up its shape",
    }
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            flax.read(path)
        assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        flax.read(tmp_path / "nowhere.msgpack")


@pytest.mark.live
def test_reference_says_the_same_today(reference_script, recorded):
    pytest.importorskip("text", reason="text.py of dalle-mini is not on the path")
    assert reference_script("dalle_mini").record() == recorded("dalle_mini")
