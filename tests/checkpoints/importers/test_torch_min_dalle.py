"""min-dalle's files: the same outputs, all layouts, and what is wrong with a folder."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dalle_pytorch.checkpoints import hub
from dalle_pytorch.checkpoints.checkpoint import build, load_state, make_header
from dalle_pytorch.checkpoints.importers import torch_min_dalle as min_dalle
from dalle_pytorch.errors import UserError
from dalle_pytorch.models.dalle_bart import DALLEBart
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig

State = dict[str, Tensor]
SMALL_VQGAN = VQGANConfig(
    ch=32, ch_mult=[1] * 5, num_res_blocks=1, attention_levels=[], z_channels=32, embed_dim=4, encoder=False
)


@pytest.fixture(scope="module")
def notes(recorded) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in recorded("min_dalle")[1].items()}


@pytest.fixture(scope="module")
def weights(notes, seeded) -> dict[str, State]:
    """Encoder and decoder under the keys of the released files."""
    states = {}
    for seed, side in enumerate(("encoder", "decoder"), start=1):
        state = {key: torch.zeros(shape) for key, shape in notes["small"][side].items()}
        seeded.fill(state, seed)
        assert seeded.checksum(state) == notes["checksums"][side]
        states[side] = state
    return states


@pytest.fixture(scope="module")
def detoker() -> State:
    torch.manual_seed(0)
    state = VQGAN(SMALL_VQGAN).state_dict()
    return {"embedding.weight": state.pop("codebook.weight"), **state}


def as_released(state: State) -> State:
    """Layers as transposed slices of one stack, which is how the released files came about."""
    state, layers = dict(state), sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.")})
    for key in [key for key in state if key.startswith("layers.0.")]:
        names = [key.replace("layers.0.", f"layers.{layer}.") for layer in layers]
        names = [name for name in names if name in state and state[name].shape == state[key].shape]
        matrices = state[key].ndim == 2
        stack = torch.stack([state[name].T if matrices else state[name] for name in names])
        state.update({name: part.T if matrices else part for name, part in zip(names, stack, strict=True)})
    return state


@pytest.fixture
def write(tmp_path, weights, detoker, notes) -> Callable[..., Path]:
    """Write a folder of models; the weights as they are or changed."""

    def write(folder: str = "dalle_bart_mini", vqgan: str = "vqgan", suffix: str = "", **changed: Any) -> Path:
        sides = {side: as_released(changed.get(side, weights[side])) for side in ("encoder", "decoder")}
        for name in (folder, vqgan):
            (tmp_path / name).mkdir(exist_ok=True)
        for side, state in sides.items():
            torch.save(state, tmp_path / folder / f"{side}{suffix}.pt")
        torch.save(detoker, tmp_path / vqgan / "detoker.pt")
        vocab = json.dumps(changed.get("vocab", notes["vocab"]))
        (tmp_path / folder / f"vocab{suffix}.json").write_text(vocab, encoding="utf-8")
        merges = "\n".join(["#version: 0.2", *notes["merges"], ""])
        (tmp_path / folder / f"merges{suffix}.txt").write_text(merges, encoding="utf-8")
        return tmp_path

    return write


def load(converted: tuple[dict[str, Any], State]) -> DALLEBart:
    header, state = converted
    model = build(json.loads(json.dumps(header)))
    load_state(model, state)
    return model.eval()


def read_outputs(bart: DALLEBart, tensors: State, notes: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the script recorded, of the network with our text tokens: no prompt, and the prompt."""
    tokens = bart.text_tokenizer.tokenize(["", notes["prompt"]], context_length=bart.config.text_len)
    padded = bart.pad_text(tokens)
    assert torch.equal(padded, tensors["text_tokens"].long())
    image = tensors["image_tokens"].long().expand(2, -1)
    memory = bart.encode_text(padded)[:, :20, ::4]
    head = bart.image_head(bart.hidden(tokens, image))[..., notes["columns"]]
    logits = bart.image_logits(tokens, image)
    return memory, head, logits.logsumexp(dim=-1), logits.argmax(dim=-1)


@torch.no_grad()
def test_outputs_are_min_dalles(write, recorded, notes):
    tensors, _ = recorded("min_dalle")
    bart = load(min_dalle.convert(write()))
    memory, head, log_sum_exp, best = read_outputs(bart, tensors, notes)
    torch.testing.assert_close(memory, tensors["memory"], atol=2e-5, rtol=0)
    torch.testing.assert_close(head, tensors["logits"], atol=2e-5, rtol=0)
    torch.testing.assert_close(log_sum_exp, tensors["log_sum_exp"], atol=2e-5, rtol=0)
    assert (best == tensors["best"]).float().mean() > 0.99  # but for ties


@torch.no_grad()
def test_released_weights_keep_their_half_precision(write, recorded, notes, weights):
    half = {side: {key: tensor.half() for key, tensor in state.items()} for side, state in weights.items()}
    bart = load(min_dalle.convert(write(**half)))
    assert bart.image_head.weight.dtype == bart.encoder.blocks[0].attention.to_qkv.weight.dtype == torch.float16
    tensors, _ = recorded("min_dalle")
    torch.testing.assert_close(read_outputs(bart, tensors, notes)[1].float(), tensors["logits"], atol=0.05, rtol=0)


def test_header_tells_the_sizes(write, notes):
    header, state = min_dalle.convert(write())
    config = header["config"]
    assert header["kind"] == "dalle_bart"
    sizes = {"dim": 128, "heads": 2, "ffn_dim": 96, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {"text_vocab_size": 120, "text_positions": 64, "image_vocab_size": 16384, "grid_size": 16}
    assert {name: config[name] for name in sizes} == sizes
    assert config["bos_id"] == 16384
    assert header["vae"]["config"]["pixel_range"] == "zero_to_one"
    assert header["vae"]["config"]["norm_eps"] == 1e-6
    assert header["text_tokenizer"]["normalize"] == "min_dalle"
    assert header["text_tokenizer"]["merges"] == notes["merges"]
    assert sum(name.startswith("vae.") for name in state) == len(VQGAN(SMALL_VQGAN).state_dict())


def test_options_reach_the_model(write):
    header, _ = min_dalle.convert(write(), bos_id=16383, heads=4, norm_eps=1e-5, normalize="dalle_mini")
    assert (header["config"]["bos_id"], header["config"]["heads"]) == (16383, 4)
    assert header["vae"]["config"]["norm_eps"] == 1e-5
    assert header["text_tokenizer"]["normalize"] == "dalle_mini"


def same(one: tuple[dict[str, Any], State], other: tuple[dict[str, Any], State]) -> bool:
    alike = one[1].keys() == other[1].keys() and all(torch.equal(one[1][key], other[1][key]) for key in one[1])
    return one[0] == other[0] and alike


def test_all_layouts_hold_the_same_model(write, tmp_path):
    expected = min_dalle.convert(write())
    assert same(min_dalle.convert(tmp_path / "dalle_bart_mini"), expected)
    assert same(min_dalle.convert(tmp_path, mega=False), expected)
    write("mega_hub", "mega_hub")
    assert same(min_dalle.convert(tmp_path / "mega_hub"), expected)
    assert same(min_dalle.convert(tmp_path / "mega_hub", mega=True), expected)
    write("hub", "hub", "_mini")
    assert same(min_dalle.convert(tmp_path / "hub"), expected)
    with pytest.raises(ValueError, match="no DALL·E mega in min-dalle's files here"):
        min_dalle.convert(tmp_path / "hub", mega=True)
    write("hub", "hub")
    with pytest.raises(ValueError, match="holds a mini and a mega"):
        min_dalle.convert(tmp_path / "hub")


def test_of_two_models_one_is_chosen(write, tmp_path):
    write()
    write("dalle_bart_mega")
    with pytest.raises(ValueError, match="holds a mini and a mega: choose with mega=false or mega=true"):
        min_dalle.convert(tmp_path)
    (tmp_path / "dalle_bart_mega/vocab.json").unlink()
    assert min_dalle.convert(tmp_path, mega=False)
    with pytest.raises(ValueError, match=r"incomplete .*, without .*dalle_bart_mega/vocab\.json$"):
        min_dalle.convert(tmp_path, mega=True)


def test_files_saved_from_modules_fit_too(write, weights, tmp_path):
    """min-dalle's own modules have scales of ones for all norms."""
    plain = min_dalle.convert(write())
    full = {side: with_scales(state, 1.0) for side, state in weights.items()}
    assert len(full["encoder"]) - len(weights["encoder"]) == 2 * 3 + 1
    assert len(full["decoder"]) - len(weights["decoder"]) == 2 * 4 + 1
    write("full", "full", **full)
    assert same(min_dalle.convert(tmp_path / "full"), plain)
    trained = {side: with_scales(state, 1.01) for side, state in weights.items()}
    write("trained", "trained", encoder=full["encoder"], decoder=trained["decoder"])
    with pytest.raises(ValueError, match=r"decoder\.pt: trained scales.*layers\.0\.glu\.ln0\.weight"):
        min_dalle.convert(tmp_path / "trained")


def with_scales(state: State, value: float) -> State:
    """A scale for every norm that has only a bias."""
    biases = [key for key in state if key.endswith(".bias") and key.replace(".bias", ".weight") not in state]
    return {**state, **{key.replace(".bias", ".weight"): torch.full_like(state[key], value) for key in biases}}


@pytest.mark.parametrize(
    ("name", "sizes", "tensors", "parameters"),
    [
        ("mini", (12, 1024, 2730, 50264, 16384), (149, 234), (202_649_584, 235_313_136)),
        ("mega", (24, 2048, 4096, 50272, 16415), (293, 462), (1_110_220_800, 1_477_746_688)),
    ],
)
def test_full_size_weights_fit_one_to_one(name, sizes, tensors, parameters, notes):
    """Ours are min-dalle's but for the scales that the files have not; q, k, v and fc0, fc1 are joined."""
    layers, dim, ffn, text_rows, image_rows = sizes
    with torch.device("meta"):
        encoder = stack(layers, dim, ffn, text_rows, 64, cross=False)
        decoder = stack(layers, dim, ffn, image_rows + 1, 256, cross=True)
        decoder["lm_head.weight"] = torch.empty(image_rows + 1, dim)
    assert (len(encoder), len(decoder)) == tensors
    config, state = min_dalle.assemble(encoder, decoder, ("e", "d"), bos_id=16384, heads=None)
    assert (config.heads, config.dim // config.heads) == (dim // 64, 64)
    assert not encoder
    assert not decoder
    model = build(make_header(config, vae=make_header(SMALL_VQGAN)))
    own = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith("vae.")}
    assert own.keys() == state.keys()
    assert all(own[key].shape == state[key].shape for key in own)
    ours = {"encoder": 0, "decoder": 0}
    for key, tensor in own.items():
        ours["encoder" if key.startswith(("encoder.", "text_")) else "decoder"] += tensor.numel()
    without = {"encoder": (2 * dim + ffn) * layers + dim, "decoder": (3 * dim + ffn) * layers + dim}
    for side, theirs in zip(("encoder", "decoder"), parameters, strict=True):
        assert ours[side] + without[side] == theirs == notes["full"][name][side]["parameters"]
    missing = {"encoder": 3 * layers + 1, "decoder": 4 * layers + 1}
    for side, count in zip(("encoder", "decoder"), tensors, strict=True):
        assert count + missing[side] == notes["full"][name][side]["tensors"]


def stack(layers: int, dim: int, ffn: int, rows: int, positions: int, *, cross: bool) -> State:
    """Keys and shapes of a released file, written down by hand."""
    state = {"embed_tokens.weight": torch.empty(rows, dim), "embed_positions.weight": torch.empty(positions, dim)}
    state |= {f"layernorm_embedding.{kind}": torch.empty(dim) for kind in ("weight", "bias")}
    state["final_ln.bias"] = torch.empty(dim)
    for layer in range(layers):
        for attention in ("self_attn", *(["encoder_attn"] if cross else [])):
            prefix = f"layers.{layer}."
            state |= {
                f"{prefix}{attention}.{part}_proj.weight": torch.empty(dim, dim) for part in ("k", "v", "q", "out")
            }
            state[f"{prefix}pre_{attention}_layer_norm.bias"] = torch.empty(dim)
            state |= {f"{prefix}{attention}_layer_norm.{kind}": torch.empty(dim) for kind in ("weight", "bias")}
        state |= {f"{prefix}glu.ln0.bias": torch.empty(dim), f"{prefix}glu.ln1.bias": torch.empty(ffn)}
        state |= {f"{prefix}glu.fc{i}.weight": torch.empty(ffn, dim) for i in (0, 1)}
        state[f"{prefix}glu.fc2.weight"] = torch.empty(dim, ffn)
    return state


@pytest.mark.parametrize(
    ("side", "change", "message"),
    [
        ("encoder", {"layers.0.extra.weight": torch.ones(1)}, r"encoder\.pt: .*left over.*layers\.0\.extra\.weight"),
        ("encoder", {"layers.1.self_attn.k_proj.weight": None},
         r"encoder\.pt: 1 of the 3 parts of encoder\.blocks\.1\.attention\.to_qkv\.weight are missing"),
        ("decoder", {"layers.1.glu.fc0.weight": None}, r"decoder\.pt: 1 of the 2 parts of decoder\..*to_hidden"),
        ("encoder", {"layers.0.self_attn.v_proj.weight": torch.ones(64, 128)},
         r"encoder\.pt: the parts of encoder\.blocks\.0\.attention.*\(64, 128\)"),
        ("decoder", {"embed_positions.weight": None}, r"decoder\.pt: .*lacks embed_positions\.weight"),
        ("decoder", {"embed_positions.weight": torch.ones(255, 128)}, r"decoder\.pt: .*255 rows, no square grid"),
        ("decoder", {"embed_tokens.weight": torch.ones(16385, 64)}, r"decoder\.pt: width 64 .*, but 128"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_named(side, change, message, write, weights):
    state = {**weights[side], **change}
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    with pytest.raises(ValueError, match=message) as caught:
        min_dalle.convert(write(**{side: state}))
    assert "\n" not in str(caught.value)


def test_a_missing_weight_is_named(write, weights):
    state = {key: tensor for key, tensor in weights["decoder"].items() if key != "layers.1.encoder_attn.q_proj.weight"}
    header, converted = min_dalle.convert(write(decoder=state))
    with pytest.raises(ValueError, match=r"missing decoder\.blocks\.1\.cross_attention\.to_q\.weight, left over none"):
        load_state(build(header), converted)


def test_swapped_files_are_named(write, weights):
    with pytest.raises(
        ValueError, match=r"encoder\.pt: holds the decoder, and decoder\.pt the encoder: swap"
    ) as caught:
        min_dalle.convert(write(encoder=weights["decoder"], decoder=weights["encoder"]))
    assert "\n" not in str(caught.value)


def test_files_of_two_models_are_told_apart(write, notes, weights):
    with pytest.raises(ValueError, match=r"vocab\.json: 301 text tokens, the encoder embeds 120"):
        min_dalle.convert(write(vocab={**notes["vocab"], "more": 300}))
    narrow = {
        side: {key: torch.ones([96 if size == 128 else size for size in tensor.shape]) for key, tensor in state.items()}
        for side, state in weights.items()
    }
    with pytest.raises(ValueError, match=r"width 96 is no multiple of 64; say how many heads="):
        min_dalle.convert(write(**narrow))
    assert min_dalle.convert(write(**narrow), heads=3)[0]["config"]["heads"] == 3


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_broken_and_missing_files_are_named(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no DALL·E mini or mega in min-dalle's files here"):
        min_dalle.convert(tmp_path)
    folder = write() / "dalle_bart_mini"
    whole = (folder / "encoder.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>404</html>"):
        (folder / "encoder.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"encoder\.pt"):
            min_dalle.convert(tmp_path)
    torch.save({"embed_tokens.weight": Evil()}, folder / "encoder.pt")
    with pytest.raises(ValueError, match=r"encoder\.pt calls posix\.mkdir"):
        min_dalle.convert(tmp_path)
    assert not Path("evil").exists()
    (folder / "encoder.pt").write_bytes(whole)
    for name, content in (("vocab.json", "{"), ("vocab.json", "[]"), ("merges.txt", "one-symbol")):
        before = (folder / name).read_text()
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=re.escape(name.split(".")[0])):
            min_dalle.convert(tmp_path)
        (folder / name).write_text(before)
    (tmp_path / "vqgan/detoker.pt").unlink()
    with pytest.raises(ValueError, match=r"incomplete .*, without .*vqgan/detoker\.pt"):
        min_dalle.convert(tmp_path)


def test_a_missing_package_is_named_before_weights_are_read_or_fetched(write, monkeypatch):
    folder = write()
    monkeypatch.setitem(sys.modules, "emoji", None)
    monkeypatch.setattr(min_dalle, "read", lambda path: pytest.fail(f"read {path}"))
    with pytest.raises(UserError, match="pip install emoji"):
        min_dalle.convert(folder)
    monkeypatch.setattr(hub, "_snapshot", lambda *_: pytest.fail("fetched"))
    for name in ("dalle_mini", "dalle_mega"):
        with pytest.raises(UserError, match="pip install emoji"):
            hub.fetch(name)


@pytest.mark.live
def test_reference_says_the_same_today(reference_script, recorded):
    pytest.importorskip("min_dalle")
    tensors, metadata = recorded("min_dalle")
    now, now_metadata = reference_script("min_dalle").record()
    assert now_metadata == metadata
    for name, tensor in tensors.items():
        torch.testing.assert_close(now[name], tensor, atol=1e-5, rtol=0)
