"""LlamaGen's image tokenizers: the same codes and pixels, and nothing left over."""

import json
import math

import pytest
import torch

from dalle_pytorch.checkpoints.checkpoint import assemble, build, load_state, make_header
from dalle_pytorch.checkpoints.importers import llamagen
from dalle_pytorch.checkpoints.importers.table import rename
from dalle_pytorch.checkpoints.importers.taming import vqgan_from_state


@pytest.fixture
def state(seeded, recorded):
    """The weights that the reference had, under its names."""
    _, metadata = recorded("llamagen")
    state = {key: torch.empty(shape) for key, shape in json.loads(metadata["small"]).items()}
    seeded.fill(state)
    assert seeded.checksum(state) == json.loads(metadata["checksum"])
    return state


@pytest.fixture
def write(tmp_path):
    """A file as vq_train.py writes them."""

    def save(state, where="model", **more):
        content = {
            where: state,
            "optimizer": {"state": {}},
            "discriminator": {"main.0.weight": torch.zeros(2)},
            "steps": 9,
        }
        torch.save(content | more, tmp_path / "vq_ds16_c2i.pt")
        return tmp_path / "vq_ds16_c2i.pt"

    return save


def load(path, **settings):
    """The model of a file."""
    return assemble(*llamagen.convert(path, **settings), path)


@pytest.mark.parametrize("side", [32, 48])
def test_codes_are_llamagens(side, state, write, recorded):
    tensors, _ = recorded("llamagen")
    tokens = load(write(state), image_size=side).encode(tensors[f"{side}.images"] / 255)
    assert torch.equal(tokens, tensors[f"{side}.tokens"].long())


def test_pixels_are_llamagens(state, write, recorded):
    tensors, _ = recorded("llamagen")
    images = load(write(state)).decode_grid(tensors["grid.tokens"].long())
    torch.testing.assert_close(images, tensors["grid.images"], atol=1e-5, rtol=0)


def test_length_of_codes_does_not_matter(state, write, recorded):
    tensors, _ = recorded("llamagen")
    factors = torch.linspace(0.1, 9, len(state["quantize.embedding.weight"]))[:, None]
    state["quantize.embedding.weight"] *= factors
    vqgan = load(write(state), image_size=32)
    assert torch.equal(vqgan.encode(tensors["32.images"] / 255), tensors["32.tokens"].long())
    images = vqgan.decode_grid(tensors["grid.tokens"].long())
    torch.testing.assert_close(images, tensors["grid.images"], atol=1e-5, rtol=0)


def test_sizes_come_from_the_weights(state, write):
    config = llamagen.convert(write(state))[0]["config"]
    sizes = {"ch": 32, "ch_mult": [1, 2, 3], "attention_levels": [2], "codebook_size": 96, "embed_dim": 8}
    assert config | sizes | {"image_size": 256, "normalize_codes": True} == config


@pytest.mark.parametrize("where", ["model", "ema", "state_dict"])
def test_weights_are_found_where_they_lie(where, state, write):
    _, weights = llamagen.convert(write(state, where))
    assert torch.equal(weights["codebook.weight"], state["quantize.embedding.weight"])


def test_the_average_is_taken_where_asked(state, write):
    average = {key: tensor + 1 for key, tensor in state.items()}
    _, weights = llamagen.convert(write(state, ema=average), ema=True)
    assert torch.equal(weights["codebook.weight"], average["quantize.embedding.weight"])
    with pytest.raises(ValueError, match="no averages"):
        llamagen.convert(write(state), ema=True)


def test_the_gpts_tokenizer_is_taken_not_its_average(state, write):
    ema = {key: tensor + 1 for key, tensor in state.items()}
    _, weights = llamagen.convert(write(state, ema=ema))
    assert torch.equal(weights["codebook.weight"], state["quantize.embedding.weight"])


@pytest.mark.parametrize(("name", "count", "parameters"), [("VQ-16", 344, 71_883_403), ("VQ-8", 300, 70_109_835)])
def test_full_size_weights_fit_one_to_one(name, count, parameters, recorded):
    _, metadata = recorded("llamagen")
    state = {key: torch.empty(shape, device="meta") for key, shape in json.loads(metadata["full"])[name].items()}
    levels = {"VQ-16": 5, "VQ-8": 4}[name]
    renamed = rename(state, llamagen.taming_names(levels))
    config, weights = vqgan_from_state(
        renamed, pixel_range="minus_one_to_one", norm_eps=1e-6, image_size=256, normalize_codes=True
    )
    model = build(make_header(config))
    load_state(model, weights)
    assert len(state) == count == len(model.state_dict()) + 1  # the one is the buffer of codes used
    assert sum(math.prod(tensor.shape) for tensor in model.state_dict().values()) == parameters
    assert len(config.ch_mult) == levels


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("encoder.conv_blocks.0.skip.weight", r"left over .*encoder\.conv_blocks\.0\.skip\.weight"),
        ("decoder.mid.3.norm1.weight", r"left over .*decoder\.mid\.3\.norm1\.weight"),
        ("encoder.conv_blocks.0.attn.0.q.weight", r"left over encoder\.down\.0\.attn\.0\.q\.weight"),
    ],
)
def test_extra_weights_are_refused(key, message, state, write):
    with pytest.raises(ValueError, match=rf"vq_ds16_c2i\.pt: .*{message}"):
        load(write(state | {key: torch.zeros(3)}))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("encoder.mid.1.k.bias", r"encoder\.mid\.attn_1\.k\.bias"),
        ("decoder.conv_blocks.0.upsample.conv.weight", r"decoder\.up\.2\.upsample\.conv\.weight"),
        ("decoder.conv_blocks.2.res.0.conv1.weight", r"decoder\.up\.0\.block\.0\.conv1\.weight"),
    ],
)
def test_missing_weights_are_named(key, named, state, write):
    del state[key]
    with pytest.raises(ValueError, match=rf"vq_ds16_c2i\.pt: .*missing {named}"):
        load(write(state))


@pytest.mark.parametrize("where", ["model", "module", "state_dict"])
def test_gpts_are_refused_as_such(where, write):
    keys = ("tok_embeddings.weight", "layers.0.attention.wqkv.weight", "norm.weight", "output.weight")
    with pytest.raises(ValueError, match=r"vq_ds16_c2i\.pt: a GPT of LlamaGen"):
        llamagen.convert(write({key: torch.zeros(2) for key in keys}, where))


def test_other_and_truncated_files_are_refused(state, write):
    path = write({"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"vq_ds16_c2i\.pt: not an image tokenizer of LlamaGen"):
        llamagen.convert(path)
    path = write(state)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"vq_ds16_c2i\.pt cannot be read: truncated"):
        llamagen.convert(path)


@pytest.mark.live
def test_reference_says_the_same_today(reference_script, recorded):
    pytest.importorskip("tokenizer.tokenizer_image")
    tensors, metadata = recorded("llamagen")
    now, now_metadata = reference_script("llamagen").record()
    assert now_metadata == metadata
    for name, tensor in tensors.items():
        torch.testing.assert_close(now[name], tensor, atol=1e-5, rtol=0)
