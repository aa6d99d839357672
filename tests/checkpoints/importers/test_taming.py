"""VQGANs of taming-transformers and min-dalle's decoder: the same codes and pixels, and nothing left over."""

import json
import math

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint

from dalle_pytorch.checkpoints.checkpoint import assemble, build, load_state, make_header
from dalle_pytorch.checkpoints.importers import taming
from dalle_pytorch.checkpoints.importers.table import rename

KINDS = ("vq", "gumbel", "depth")
BAD = "model: {target: taming.models.vqgan.VQModel, params: {ddconfig: {resolution: big}}}"
LOSS = ("loss.perceptual_loss.net.slice1.0.weight", "loss.discriminator.main.0.weight", "loss.logvar")


@pytest.fixture
def make_state(seeded, recorded):
    """The weights that the reference had, under its names."""

    def make(kind="vq"):
        _, metadata = recorded("taming")
        state = {key: torch.empty(shape) for key, shape in json.loads(metadata["small"])[kind].items()}
        seeded.fill(state)
        assert seeded.checksum(state) == json.loads(metadata["checksums"])[kind]
        return state

    return make


@pytest.fixture
def write(tmp_path):
    """A file as Lightning wrote them, with the weights of the losses and a class of Lightning in it."""

    def save(state, name="last.ckpt"):
        content = {
            "epoch": 12,
            "global_step": 471_000,
            "pytorch-lightning_version": "1.0.8",
            "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5), "best_model_path": "last.ckpt"}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 4.5e-6}]}],
            "lr_schedulers": [],
            "state_dict": state | {key: torch.zeros(2) for key in LOSS},
        }
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def write_yaml(tmp_path):
    """The config of the small "vq" model, with changes."""

    def save(*, transformer=False, target="taming.models.vqgan.VQModel", n_embed=64, **changes):
        net = {"double_z": False, "z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32}
        net |= {"ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0} | changes
        model = {"target": target, "params": {"embed_dim": 6, "n_embed": n_embed, "ddconfig": net}}
        if transformer:
            name = "taming.models.cond_transformer.Net2NetTransformer"
            model = {"target": name, "params": {"first_stage_config": model, "transformer_config": {}}}
        path = tmp_path / "model.yaml"
        path.write_text(yaml.safe_dump({"model": model, "data": {"target": "main.DataModuleFromConfig"}}))
        return path

    return save


def load(path, **settings):
    """The model of a file."""
    return assemble(*taming.convert(path, **settings), path)


@pytest.mark.parametrize("side", [32, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_tamings(kind, side, make_state, write, recorded):
    tensors, _ = recorded("taming")
    vqgan = load(write(make_state(kind)), image_size=side)
    tokens = vqgan.encode(tensors[f"{kind}.{side}.images"] / 255)
    assert torch.equal(tokens, tensors[f"{kind}.{side}.tokens"].flatten(1).long())


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_tamings(kind, make_state, write, recorded):
    tensors, _ = recorded("taming")
    vqgan = load(write(make_state(kind)), image_size=32)
    images = vqgan.decode_grid(tensors[f"{kind}.grid.tokens"].long())
    torch.testing.assert_close(images, tensors[f"{kind}.grid.images"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_come_from_the_weights(kind, make_state, write):
    head, _ = taming.convert(write(make_state(kind)))
    sizes = {
        "vq": {"ch_mult": [1, 2, 2], "attention_levels": [1], "embed_dim": 6, "quantizer": "vq"},
        "gumbel": {"ch_mult": [1, 3], "attention_levels": [1], "num_res_blocks": 2, "quantizer": "gumbel"},
        "depth": {"ch_mult": [2, 1], "attention_levels": [], "channels": 1, "codebook_size": 20},
    }[kind]
    assert head["kind"] == "vqgan"
    assert head["config"] | sizes | {"ch": 32, "image_size": 256, "norm_eps": 1e-6} == head["config"]


def test_weights_alone_in_half_precision_stay_as_they_are(make_state, tmp_path):
    state = {key: tensor.half() for key, tensor in make_state().items()}
    torch.save(state, tmp_path / "bare.pt")
    _, weights = taming.convert(tmp_path / "bare.pt")
    assert len(weights) == len(state)
    assert torch.equal(weights["codebook.weight"], state["quantize.embedding.weight"])
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    _, renamed = taming.vqgan_from_state(state, pixel_range="zero_to_one", norm_eps=1e-6, image_size=32)
    assert all(any(tensor is given for given in state.values()) for tensor in renamed.values())


def test_range_of_pixels_is_that_of_the_training(make_state, write, recorded):
    """With pixels in [0, 1], the network is given and gives what it would be for [-1, 1] at half the contrast."""
    tensors, _ = recorded("taming")
    path, tokens = write(make_state()), tensors["vq.grid.tokens"].long()
    output = load(path, pixel_range="zero_to_one", image_size=32).decode_grid(tokens)
    torch.testing.assert_close((output + 1) / 2, tensors["vq.grid.images"].clamp(min=0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "count", "parameters"),
    [("vq", 343, 76_073_859), ("gumbel", 301, 68_995_971), ("detoker", 197, 46_709_891)],
)
def test_full_size_weights_fit_one_to_one(kind, count, parameters, recorded):
    _, metadata = recorded("taming")
    state = {key: torch.empty(shape, device="meta") for key, shape in json.loads(metadata["full"])[kind].items()}
    if kind == "detoker":
        state = rename(state, taming.DETOKER_TABLE)
    config, weights = taming.vqgan_from_state(state, pixel_range="minus_one_to_one", norm_eps=1e-6, image_size=256)
    model = build(make_header(config))
    load_state(model, weights)
    assert len(weights) == len(model.state_dict()) == count
    assert sum(math.prod(tensor.shape) for tensor in model.state_dict().values()) == parameters
    assert config.attention_levels == [len(config.ch_mult) - 1]
    assert (config.ch, config.num_res_blocks, config.z_channels, config.embed_dim) == (128, 2, 256, 256)


def test_pixels_are_min_dalles(seeded, recorded, tmp_path):
    tensors, metadata = recorded("taming")
    state = {key: torch.empty(shape) for key, shape in json.loads(metadata["full"])["detoker"].items()}
    seeded.fill(state)
    path = tmp_path / "detoker.pt"
    torch.save(state, path)
    vqgan = assemble(*taming.convert_detoker(path, norm_eps=1e-5), path)
    with torch.no_grad():
        images = vqgan.decode_grid(tensors["detoker.tokens"].long())
    torch.testing.assert_close(images, tensors["detoker.images"], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="only a decoder"):
        vqgan.encode(torch.rand(1, 3, 256, 256))


@pytest.mark.parametrize("transformer", [False, True])
def test_yaml_of_the_weights_gives_the_resolution(transformer, make_state, write, write_yaml):
    path, config = write(make_state()), write_yaml(transformer=transformer)
    assert taming.convert(path, config=config)[0]["config"]["image_size"] == 32
    assert taming.convert(path, config=config, image_size=64)[0]["config"]["image_size"] == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch": 64}, "ch 64, the weights have 32"),
        ({"ch_mult": [1, 2]}, r"ch_mult \[1, 2\], the weights have \[1, 2, 2\]"),
        ({"n_embed": 1024}, "n_embed 1024, the weights have 64"),
        ({"out_ch": 1}, "out_ch 1, the weights have 3"),
        ({"attn_resolutions": [8, 16]}, r"attn_resolutions \[1, 2\], the weights have \[1\]"),
        ({"target": "taming.models.vqgan.GumbelVQ"}, "target gumbel, the weights have vq"),
    ],
)
def test_yaml_of_other_weights_is_refused(change, message, make_state, write, write_yaml):
    with pytest.raises(ValueError, match=rf"model\.yaml is not the config of .*last\.ckpt.* {message}"):
        taming.convert(write(make_state()), config=write_yaml(**change))


@pytest.mark.parametrize("text", ["model: [", "a: 1", "model: {params: {ddconfig: {resolution: 4}}}", "- 1", BAD])
def test_other_yamls_are_refused(text, make_state, write, tmp_path):
    config = tmp_path / "other.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=r"other\.yaml: no config of a VQGAN") as refused:
        taming.convert(write(make_state()), config=config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("encoder.down.0.block.0.norm3.weight", r"left over .*encoder\.down\.0\.block\.0\.norm3\.weight"),
        ("decoder.up.0.block.7.conv1.weight", r"missing .*block\.[234].*"),
        ("encoder.down.0.attn.0.q.weight", r"left over encoder\.down\.0\.attn\.0\.q\.weight"),
        ("vae.model.quant_conv.weight", r"left over .*vae\.model\.quant_conv\.weight"),
        ("quantize.used", "remap"),
        ("quantize.embedding.embed_avg", "EMAVQ"),
        ("model_ema.decay", "moving averages"),
        ("colorize", "label maps"),
    ],
)
def test_extra_weights_are_refused(key, message, make_state, write):
    with pytest.raises(ValueError, match=rf"last\.ckpt: .*{message}") as refused:
        load(write(make_state() | {key: torch.zeros(3)}))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("vq", "encoder.conv_in.weight"),
        ("vq", "encoder.mid.attn_1.k.bias"),
        ("vq", "decoder.up.1.block.0.conv1.weight"),
        ("vq", "decoder.up.2.upsample.conv.weight"),
        ("vq", "post_quant_conv.weight"),
        ("gumbel", "quantize.proj.bias"),
    ],
)
def test_missing_weights_are_named(kind, key, make_state, write):
    state = make_state(kind)
    del state[key]
    with pytest.raises(ValueError, match=rf"last\.ckpt: .*missing.*{key.replace('quantize.proj', 'code_logits')}"):
        load(write(state))


def test_latents_with_a_variance_and_other_shapes_are_refused(make_state, write):
    state = make_state()
    double = torch.cat([state["encoder.conv_out.weight"]] * 2)
    with pytest.raises(ValueError, match=r"gives 32 channels .* reads 16"):
        taming.convert(write(state | {"encoder.conv_out.weight": double}))
    with pytest.raises(ValueError, match=r"codebook\.weight has 1 axes, not 2"):
        taming.convert(write(state | {"quantize.embedding.weight": torch.zeros(64)}))
    with pytest.raises(ValueError, match="reads 1 picture channels, the decoder gives 3"):
        taming.convert(write(state | {"encoder.conv_in.weight": state["encoder.conv_in.weight"][:, :1]}))


def test_swapped_and_truncated_files_are_refused(make_state, write, tmp_path):
    state = make_state()
    whole = write(state)
    state["embedding.weight"] = state.pop("quantize.embedding.weight")
    detoker = {key: tensor for key, tensor in state.items() if not key.startswith(("encoder.", "quant_conv."))}
    torch.save(detoker, tmp_path / "detoker.pt")
    with pytest.raises(ValueError, match=r"detoker\.pt: not a VQGAN of taming.*looks like min-dalle's decoder"):
        taming.convert(tmp_path / "detoker.pt")
    with pytest.raises(ValueError, match=r"last\.ckpt: not min-dalle's decoder.*looks like a whole VQGAN"):
        taming.convert_detoker(whole)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be read: truncated"):
        taming.convert(whole)


@pytest.mark.live
def test_reference_says_the_same_today(reference_script, recorded):
    pytest.importorskip("taming")
    tensors, metadata = recorded("taming")
    now, now_metadata = reference_script("taming").record()
    assert now_metadata == metadata
    for name, tensor in tensors.items():
        torch.testing.assert_close(now[name], tensor, atol=1e-5, rtol=0)
