"""DALLE-pytorch's checkpoints: the same codes, pixels, logits and greedy tokens for every option, nothing left over."""

import argparse
import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dalle_pytorch import SamplingConfig, load, save
from dalle_pytorch.checkpoints import checkpoint, loading
from dalle_pytorch.checkpoints.checkpoint import assemble, build, make_header
from dalle_pytorch.checkpoints.importers import lucidrains_dalle as importer
from dalle_pytorch.commands import import_weights as command
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.strategies import generate_image_tokens
from dalle_pytorch.models.dalle import DALLEConfig
from dalle_pytorch.models.openai_dvae import OpenAIDVAE, OpenAIDVAEConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
from dalle_pytorch.training.dalle import TrainDALLEConfig
from dalle_pytorch.training.initial import inherit_config

CASES = (
    *("defaults", "bare", "rotary", "shift", "sandwich", "stable", "reversible", "reversible_bare", "tied", "shared"),
    *("patterns", "static_masks", "all"),
)
VAES = ("plain", "blocks", "rgba")


@pytest.fixture
def make_weights(seeded, recorded):
    """The weights that the reference had, under its names; shared ones are one tensor."""

    def make(kind, name):
        tensors, metadata = recorded("dalle_pytorch")
        case = json.loads(metadata[kind])[name]
        own = {key: torch.empty(shape) for key, shape in case["shapes"].items() if key not in case["aliases"]}
        seeded.fill(own)
        weights = {key: own[case["aliases"].get(key, key)] for key in case["shapes"]}
        assert seeded.checksum(weights) == case["checksum"]
        if case["hparams"].get("rotary_emb", True) and kind == "dalles":
            weights["transformer.pos_emb"] = tensors[f"angles.{case['hparams']['dim_head']}"]
        return weights, case

    return make


@pytest.fixture
def write(tmp_path, make_weights):
    """A vae.pt or dalle.pt as its scripts write it, with changes of its parts (a part of None is left out)."""

    def save_as(kind, name, *, legacy=False, hparams=None, **changes):
        weights, case = make_weights(kind, name)
        content = {"hparams": as_written(case["hparams"]) | (hparams or {}), "weights": weights}
        if kind == "dalles":
            content |= {"vae_params": case["vae_params"], "epoch": 3, "version": "1.6.6"}
            content |= {"vae_class_name": "DiscreteVAE", "scheduler_state": None}
            content["opt_state"] = {
                "state": {0: {"step": 5, "exp_avg": torch.zeros(3)}},
                "param_groups": [{"lr": 3e-4}],
            }
        content |= changes
        path = tmp_path / ("vae.pt" if kind == "vaes" else "dalle.pt")
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        return path

    return save_as


def as_written(hparams):
    """Lists of JSON as the tuples that they were."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in hparams.items()}


def imported(path, **options):
    return assemble(*importer.convert(path, **options), path)


@pytest.mark.parametrize("name", VAES)
def test_a_vae_gives_the_same_codes_and_pixels(write, recorded, name):
    tensors, _ = recorded("dalle_pytorch")
    vae = imported(write("vaes", name))
    images, tokens = tensors[f"vae.{name}.images"] / 255, tensors[f"vae.{name}.tokens"].long()
    assert torch.equal(vae.encode(images), tokens)
    expected = tensors[f"vae.{name}.decoded"] * vae.std + vae.mean  # it gives normalised values
    assert vae.std.flatten().tolist() == [0.5, 0.5, 0.5, 1.0][: vae.channels]
    torch.testing.assert_close(vae.decode(tokens[:1]), expected.clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_a_dalle_gives_the_same_logits_and_tokens(write, recorded, name):
    """Logits within 1e-5, and with our cache the tokens that it finds likeliest without one."""
    tensors, _ = recorded("dalle_pytorch")
    dalle = imported(write("dalles", name))
    text, images = tensors["text"].long(), tensors["images"] / 255
    logits = dalle.logits(text, dalle.vae.encode(images))
    torch.testing.assert_close(logits.text, tensors[f"{name}.text"], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.image, tensors[f"{name}.image"], atol=1e-5, rtol=0)
    tokens = generate_image_tokens(dalle, text, torch.rand(2, 64), SamplingConfig(temperature=0.0))
    assert torch.equal(tokens, tensors[f"{name}.greedy"].long())


@pytest.mark.parametrize("name", ["defaults", "all"])
def test_an_imported_dalle_is_saved_and_trained_on(write, tmp_path, name):
    dalle = imported(write("dalles", name), caption_dropout=0.2)
    save(dalle, tmp_path / "ours.safetensors")
    again = load(tmp_path / "ours.safetensors", kind="dalle")
    text, image = torch.tensor([[3, 1, 0, 0, 0, 0]]), torch.randint(10, (1, 64))
    expected = dalle.logits(text, image).image
    assert torch.equal(again.logits(text, image).image, expected)
    assert again.config.caption_dropout == 0.2
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(again.train().loss(text, image, generator=torch.Generator().manual_seed(0)).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    # no weight was another's memory but where the model says so
    assert torch.equal(dalle.logits(text, image).image, expected)
    assert not torch.equal(again.bos, again.text_emb.weight[0])


def test_an_old_format_file_is_read_too(write, recorded):
    tensors, _ = recorded("dalle_pytorch")
    dalle = imported(write("dalles", "bare", legacy=True))
    logits = dalle.logits(tensors["text"].long(), dalle.vae.encode(tensors["images"] / 255))
    torch.testing.assert_close(logits.image, tensors["bare.image"], atol=1e-5, rtol=0)


def test_position_names_of_older_packages(write, make_weights, recorded):
    """axial-positional-embedding 0.2.1 called its tables weights_0 and weights_1."""
    tensors, _ = recorded("dalle_pytorch")
    weights, _ = make_weights("dalles", "bare")
    older = {key.replace("pos_emb.weights.", "pos_emb.weights_"): tensor for key, tensor in weights.items()}
    assert older.keys() != weights.keys()
    dalle = imported(write("dalles", "bare", weights=older))
    logits = dalle.logits(tensors["text"].long(), dalle.vae.encode(tensors["images"] / 255))
    torch.testing.assert_close(logits.image, tensors["bare.image"], atol=1e-5, rtol=0)


def test_half_precision_files_keep_their_type(write, make_weights):
    weights, _ = make_weights("dalles", "defaults")
    path = write("dalles", "defaults", weights={key: tensor.half() for key, tensor in weights.items()})
    header, state = importer.convert(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert assemble(header, state, path).text_head.weight.dtype == torch.float32


def test_a_vqgan_inside(write, make_weights, recorded):
    """Always for 256 pixels there; its weights lie under vae.model., with those of the training losses."""
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=[1] * 6, num_res_blocks=1, z_channels=8, embed_dim=8, codebook_size=10))
    weights, _ = make_weights("dalles", "bare")
    inside = {f"vae.model.{key}": tensor for key, tensor in vqgan.state_dict().items()}
    inside["vae.model.quantize.embedding.weight"] = inside.pop("vae.model.codebook.weight")
    inside["vae.model.loss.logvar"] = torch.zeros(())
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("vae.")} | inside
    path = write("dalles", "bare", weights=weights, vae_params=None, vae_class_name="VQGanVAE")
    dalle = imported(path)
    assert isinstance(dalle.vae, VQGAN)
    assert (dalle.grid_size, dalle.codebook_size, dalle.vae.image_size) == (8, 10, 256)
    tokens = torch.randint(10, (1, 64))
    torch.testing.assert_close(dalle.vae.decode(tokens), vqgan.eval().decode(tokens))
    tensors, _ = recorded("dalle_pytorch")
    image = torch.zeros(2, 0, dtype=torch.long)
    logits = dalle.logits(tensors["text"].long(), image).image
    torch.testing.assert_close(logits, tensors["bare.image"][:, :1], atol=1e-5, rtol=0)


def test_a_vqgans_yaml_is_compared(write, make_weights, tmp_path):
    config = tmp_path / "model.yaml"
    config.write_text("model: {target: x.VQModel, params: {embed_dim: 9, n_embed: 10, ddconfig: {resolution: 256}}}")
    with pytest.raises(ValueError, match=r"holds no VQGAN.*model.yaml"):
        importer.convert(write("dalles", "bare"), vqgan_config=config)
    vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=[1] * 6, num_res_blocks=1, z_channels=8, embed_dim=8, codebook_size=10))
    weights, _ = make_weights("dalles", "bare")
    inside = {f"vae.model.{key}": tensor for key, tensor in vqgan.state_dict().items()}
    inside["vae.model.quantize.embedding.weight"] = inside.pop("vae.model.codebook.weight")
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("vae.")} | inside
    with pytest.raises(ValueError, match=r"model.yaml is not the config.*dalle.pt"):
        importer.convert(write("dalles", "bare", weights=weights, vae_params=None), vqgan_config=config)


def test_openais_dvae_inside(write, make_weights):
    """Its modules lie under vae.enc. and vae.dec., named as in its own two files."""
    sizes = {"hidden_dim": 4, "init_dim": 4, "num_blocks": 1, "codebook_size": 10}
    dvae = OpenAIDVAE(OpenAIDVAEConfig(image_size=256, **sizes))
    inside = {foreign_name(key): tensor for key, tensor in dvae.state_dict().items()}
    inside["vae.dec.blocks.input.w"] = inside["vae.dec.blocks.input.w"].T[:, :, None, None]
    weights, case = make_weights("dalles", "bare")
    weights = {key: tensor for key, tensor in weights.items() if not key.startswith("vae.")} | inside
    for axis, name in enumerate(("weights.0", "weights.1")):  # 32 rows and columns
        shape = [1, 1, 1, case["hparams"]["dim"]]
        shape[1 + axis] = 32
        weights[f"image_pos_emb.{name}"] = torch.randn(shape)
    dalle = imported(write("dalles", "bare", weights=weights, vae_params=None, vae_class_name="OpenAIDiscreteVAE"))
    assert isinstance(dalle.vae, OpenAIDVAE)
    tokens = torch.randint(10, (1, 32 * 32))
    torch.testing.assert_close(dalle.vae.decode(tokens), dvae.eval().decode(tokens))
    assert dalle.logits(torch.ones(1, 6, dtype=torch.long), tokens).image.isfinite().all()


def foreign_name(key):
    """Of a weight of our OpenAIDVAE, in a dalle.pt."""
    part, layer, *rest = key.split(".")
    kind = "w" if rest[-1] == "weight" else "b"
    start = f"vae.{part[:3]}.blocks"
    if layer == "input":
        return f"{start}.input.{kind}"
    if layer == "output":
        return f"{start}.output.conv.{kind}"
    group, block, name = rest[:3]
    path = "id_path" if name == "id_path" else f"res_path.{name}"
    return f"{start}.group_{group}.block_{block}.{path}.{kind}"


def test_deepspeeds_header_says_where_the_weights_are(write):
    path = write("dalles", "bare", weights="To get a working standard checkpoint, look into consolidating")
    for read in (importer.convert, load):
        with pytest.raises(UserError, match=r"dalle.pt: holds no weights.*give the folder.*zero_to_fp32.py"):
            read(path)


def test_a_deepspeed_folder_is_read(write, make_weights, tmp_path):
    """By the folder or by a file in it; not where its weights are in shards."""
    weights, case = make_weights("dalles", "bare")
    expected = load(write("dalles", "bare")).state_dict()
    folder = tmp_path / "dalle-ds-cp"
    (folder / "global_step7").mkdir(parents=True)
    (folder / "latest").write_text("global_step7\n")
    about = {"hparams": as_written(case["hparams"]), "vae_params": case["vae_params"], "epoch": 3}
    torch.save({**about, "weights": "To get a working standard checkpoint, look into ..."}, folder / "auxiliary.pt")
    states = folder / "global_step7" / "mp_rank_00_model_states.pt"
    torch.save({"module": weights, "optimizer": None, "ds_config": {}, "ds_version": "0.4.0", **about}, states)
    for path in (folder, folder / "auxiliary.pt", states):
        found = load(path).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    (folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    with pytest.raises(UserError, match=r"in shards.*zero_to_fp32.py"):
        load(folder)


def test_names_of_data_parallel_and_settings_as_objects_are_read(write, make_weights):
    expected = copy.deepcopy(load(write("dalles", "bare")).state_dict())  # not views of the file, which is replaced
    weights, case = make_weights("dalles", "bare")
    settings = {"hparams": as_written(case["hparams"]), "vae_params": case["vae_params"]}
    objects = {name: argparse.Namespace(**value) for name, value in settings.items()}
    of_omegaconf = {
        name: OmegaConf.create({key: list(item) if isinstance(item, tuple) else item for key, item in value.items()})
        for name, value in settings.items()
    }
    wrapped = {"weights": {f"module.{name}": tensor for name, tensor in weights.items()}}
    for changes in (wrapped, objects, of_omegaconf):
        content = {"weights": weights, **settings, **changes}
        path = write("dalles", "bare")
        torch.save(content, path)
        found = load(path).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    torch.save({"weights": weights, "hparams": 3, "vae_params": {}}, path)
    with pytest.raises(UserError, match="hparams are no dict"):
        load(path)


def test_misfits_are_named(write, make_weights, tmp_path):
    with pytest.raises(ValueError, match=r"sparse.*1.6.6 itself cannot run"):
        importer.convert(write("dalles", "bare", hparams={"attn_types": ("full", "sparse")}))
    with pytest.raises(ValueError, match=r"dalle.pt: hparams has ff_mult"):
        importer.convert(write("dalles", "bare", hparams={"ff_mult": 4}))
    with pytest.raises(ValueError, match=r"left over.*text_pos_emb"):
        importer.convert(write("dalles", "bare", hparams={"rotary_emb": True}))
    with pytest.raises(ValueError, match=r"left over.*fn\.fn\.fn"):  # layers wrapped for token shift
        importer.convert(write("dalles", "bare", hparams={"shift_tokens": True}))
    weights, _ = make_weights("dalles", "defaults")
    weights["transformer.pos_emb"] = weights["transformer.pos_emb"] * 1.001
    with pytest.raises(ValueError, match=r"rotary angles"):
        importer.convert(write("dalles", "defaults", weights=weights))
    weights, _ = make_weights("dalles", "bare")
    with pytest.raises(ValueError, match=r"left over.*transformer.surplus"):
        importer.convert(write("dalles", "bare", weights=weights | {"transformer.surplus": torch.zeros(1)}))
    del weights["image_pos_emb.weights.0"]
    with pytest.raises(ValueError, match=r"missing: row_pos.weight"):
        importer.convert(write("dalles", "bare", weights=weights))
    weights, _ = make_weights("dalles", "bare")
    del weights["transformer.layers.layers.1.0.scale"]
    with pytest.raises(ValueError, match=r"dalle.pt.*missing transformer.blocks.1.attn_post.factor"):
        imported(write("dalles", "bare", weights=weights))
    with pytest.raises(ValueError, match=r"neither its vae.pt nor its dalle.pt"):
        importer.convert(write("vaes", "plain", weights={"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"left over.*encoder"):
        importer.convert(write("vaes", "plain", hparams={"num_layers": 1}))
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt: is no vae.pt or dalle.pt"):
        importer.convert(tmp_path / "other.pt")
    path = write("dalles", "bare")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"dalle.pt cannot be read: truncated"):
        importer.convert(path)


@pytest.mark.parametrize("name", ["defaults", "reversible"])
def test_it_is_found_out_and_trained_on_from(write, name):
    """By what the file holds alone; ``train_dalle.py init=`` then takes its sizes."""
    path = write("dalles", name)
    assert loading.load(path, kind="dalle").config.foreign.rotary == "dalle_pytorch"
    config = TrainDALLEConfig(init=str(path), model=DALLEConfig())
    inherit_config(config, {"model.ff_dropout"})
    foreign = config.model.foreign
    assert (config.model.dim, foreign.reversible, foreign.layer_scale) == (32, name == "reversible", True)
    assert loading.load(write("vaes", "blocks"), kind="vae").config.num_resnet_blocks == 2


def test_its_notes_reach_the_saved_file(write, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    monkeypatch.setattr(sys, "argv", ["importers", "auto", str(write("dalles", "bare")), "--out", str(out)])
    command.main()
    assert checkpoint.read_header(out)["training"] == {"source": "DALLE-pytorch", "version": "1.6.6", "epoch": 3}


def test_signatures_tell_its_files(make_weights):
    assert make_weights("vaes", "plain")[0].keys() >= importer.VAE_SIGNATURE
    assert make_weights("dalles", "all")[0].keys() >= importer.REVERSIBLE_SIGNATURE
    for name in set(CASES) - {"all", "reversible", "reversible_bare"}:
        assert make_weights("dalles", name)[0].keys() >= importer.SIGNATURE


@pytest.fixture
def write_tokenizer(tmp_path):
    """A tokenizer.json of 20 ids, with or without special tokens in front."""

    def make(special, unknown=None):
        tokenizer = Tokenizer(models.BPE(unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=20, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(["a red cat", "a blue cat", "a green tree"] * 9, trainer)
        tokenizer.save(str(tmp_path / "bpe.json"))
        return tmp_path / "bpe.json", tokenizer

    return make


@pytest.mark.parametrize(
    ("special", "unknown"), [([], None), (["[PAD]"], None), (["[UNK]"], "[UNK]"), (["[PAD]", "[UNK]"], "[UNK]")]
)
def test_a_hug_tokenizer_keeps_its_ids(write, write_tokenizer, special, unknown):
    """Whatever its id 0 is: DALLE-pytorch takes that for padding."""
    path, theirs = write_tokenizer(special, unknown)
    header, _ = importer.convert(write("dalles", "bare"), tokenizer=path)
    dalle = build(header)
    for caption in ("a red tree", "blue cat", "a green cat"):
        assert dalle.text_tokenizer.encode(caption) == [i for i in theirs.encode(caption).ids if i]
    assert dalle.text_tokenizer.vocab_size == dalle.config.text_vocab_size == 20
    assert 0 not in dalle.text_tokenizer.encode("zzz a # cat")


def test_another_tokenizer_is_refused(write, write_tokenizer):
    path, _ = write_tokenizer(["[PAD]"])
    spec = json.loads(path.read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 20, "content": "[NEW]"})
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"trained with 20 text ids.*bpe.json has 21"):
        importer.convert(write("dalles", "bare"), tokenizer=path)
    with pytest.raises(FileNotFoundError, match=r"none.json"):
        importer.convert(write("dalles", "bare"), tokenizer=path.with_name("none.json"))


def test_clips_tokenizer_is_the_default_for_its_vocabulary(write):
    assert importer.convert(write("dalles", "bare"))[0]["text_tokenizer"] is None
    header, _ = importer.convert(write("dalles", "bare", hparams={"num_text_tokens": 49_408}))
    assert header["text_tokenizer"] == {"kind": "clip"}


def test_a_released_size_has_the_packages_count():
    """dim 1024, depth 16, heads 16 over OpenAI's 8192 codes; counted by the package: see the reference script."""
    h = importer.DALLE_HPARAMS | {"dim": 1024, "depth": 16, "heads": 16, "num_text_tokens": 49_408}
    config = importer.dalle_config(h, 0.0)
    dalle = build(make_header(config, vae=make_header(OpenAIDVAEConfig())))
    total = sum(p.numel() for name, p in dalle.named_parameters() if not name.startswith("vae."))
    text, layer = 49_408 + 256, 4 * 1024**2 + 12 * 1024**2 + 1024 + 8 * 1024 + 1024 + 3 * 2 * 1024
    theirs = (text + 8192) * (2 * 1024 + 1) + 16 * layer + 2 * 1024
    assert total == theirs + 1024  # our <bos> is a weight of its own


@pytest.mark.live
def test_reference_says_the_same_today(recorded, tmp_path):
    """``PEER_PYTHON``: an interpreter that has dalle-pytorch 1.6.6 (benchmarks/peer.py says how to make one)."""
    peer = os.environ.get("PEER_PYTHON")
    if peer is None:
        pytest.skip("PEER_PYTHON names no interpreter with dalle-pytorch 1.6.6")
    script = os.path.join(os.path.dirname(__file__), "reference", "dalle_pytorch.py")
    subprocess.run(
        [peer, "-P", script, str(tmp_path / "now.safetensors")], check=True, env={"PATH": os.environ["PATH"]}
    )
    tensors, _ = recorded("dalle_pytorch")
    now = load_file(tmp_path / "now.safetensors")
    assert now.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(now[name], tensor, atol=1e-5, rtol=0)
