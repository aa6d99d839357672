import hashlib
import json
import os
import threading
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.errors import UserError
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.generation.strategies import generate_image_tokens
from dalle_pytorch.models.clip import CLIP
from dalle_pytorch.models.dalle import DALLE, DALLEConfig
from dalle_pytorch.models.discrete_vae import DiscreteVAE
from dalle_pytorch.models.skeleton import skeleton
from dalle_pytorch.models.transformer import ForeignConfig
from dalle_pytorch.text import BPETokenizer


@pytest.fixture
def dalle(make_dalle):
    model = make_dalle(tie_embeddings=True, shared_attn_ids=[0, 1], text_vocab_size=262)
    model.text_tokenizer = BPETokenizer.train(["a red square", "a blue square"], 262)
    return model


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_round_trip_is_exact(dalle, tiny_clip, tiny_vae, tmp_path, suffix):
    for model, cls in ((tiny_vae, DiscreteVAE), (dalle, DALLE), (tiny_clip, CLIP)):
        path = tmp_path / f"{cls.__name__}{suffix}"
        checkpoint.save(model, path, training={"step": 7})
        loaded = checkpoint.load(path)
        assert type(loaded) is cls
        assert not loaded.training
        assert asdict(loaded.config) == asdict(model.config)
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
        assert checkpoint.read_header(path)["training"] == {"step": 7}


def test_a_dalle_carries_its_tokenizers_and_its_ties(dalle, tmp_path):
    checkpoint.save(dalle, tmp_path / "dalle.safetensors")
    loaded = checkpoint.load(tmp_path / "dalle.safetensors", kind="dalle")
    assert loaded.text_tokenizer.encode("a red square") == dalle.text_tokenizer.encode("a red square")
    assert loaded.image_head.weight is loaded.image_emb.weight
    assert not any(p.requires_grad for p in loaded.vae.parameters())
    text, image = torch.tensor([[3, 4]]), torch.randint(12, (1, 16))
    assert torch.equal(loaded.loss(text, image).loss, dalle.loss(text, image).loss)


def test_a_shared_tensor_is_stored_once(dalle):
    state = checkpoint.distinct(dalle.state_dict())
    assert "image_emb.weight" in state
    assert "image_head.weight" not in state


def test_files_are_not_overwritten_unasked(tiny_vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    checkpoint.save(tiny_vae, path)
    with pytest.raises(FileExistsError, match=r"vae\.safetensors"):
        checkpoint.save(tiny_vae, path)
    checkpoint.save(tiny_vae, path, overwrite=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_crash_while_writing_leaves_the_old_file(tiny_vae, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"vae{suffix}"
    checkpoint.save(tiny_vae, path)
    before = path.read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tiny_vae, path, training={"step": 1}, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_named(tiny_vae, tmp_path, suffix):
    path = tmp_path / f"vae{suffix}"
    checkpoint.save(tiny_vae, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"vae{suffix}.*truncated"):
        checkpoint.load(path)


def test_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        checkpoint.load(tmp_path / "nothing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("foreign.safetensors", "foreign.pt", "text.pt"):
        with pytest.raises(ValueError, match=name):
            checkpoint.load(tmp_path / name)
    with pytest.raises(ValueError, match="Linear"):
        checkpoint.save(torch.nn.Linear(1, 1), tmp_path / "linear.pt")


def test_another_kind_or_version_is_refused(tiny_vae, tmp_path):
    checkpoint.save(tiny_vae, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="holds a vae, a clip is needed"):
        checkpoint.load(tmp_path / "vae.safetensors", kind="clip")
    torch.save({**checkpoint.header(tiny_vae), "version": 99, "state_dict": {}}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match="99"):
        checkpoint.load(tmp_path / "new.pt")


def test_keys_missing_left_over_or_of_another_shape_are_named(tiny_vae, tmp_path):
    head, state = checkpoint.header(tiny_vae), tiny_vae.state_dict()
    wrong = {
        "codebook.weight": {k: v for k, v in state.items() if k != "codebook.weight"},
        "surplus": {**state, "surplus": torch.zeros(1)},
        r"\(1, 1\)": {**state, "codebook.weight": torch.zeros(1, 1)},
    }
    for message, weights in wrong.items():
        torch.save({**head, "state_dict": weights}, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path / "wrong.pt")
    head["config"] = {**head["config"], "sise": 3}
    torch.save({**head, "state_dict": state}, tmp_path / "wrong.pt")
    with pytest.raises(ValueError, match="sise"):
        checkpoint.load(tmp_path / "wrong.pt")


def test_the_model_does_not_change_when_it_is_saved(make_dalle, tmp_path):
    dalle = make_dalle().train()
    before = {name: tensor.clone() for name, tensor in dalle.state_dict().items()}
    checkpoint.save(dalle, tmp_path / "dalle.safetensors")
    assert dalle.training
    assert all(torch.equal(before[name], tensor) for name, tensor in dalle.state_dict().items())
    assert isinstance(dalle.config, DALLEConfig)


def test_skeletons_of_two_threads_do_not_meet():
    """One begins before and ends before the other."""
    devices, inside, begun = {}, threading.Event(), threading.Event()

    def first():
        with skeleton():
            inside.set()
            assert begun.wait(10)
            devices["first"] = torch.nn.Linear(1, 1).weight.device.type

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    devices["outside"] = torch.nn.Linear(1, 1).weight.device.type
    with skeleton():
        begun.set()
        thread.join(10)
        devices["second"] = torch.nn.Linear(1, 1).weight.device.type
    devices["after"] = torch.nn.Linear(1, 1).weight.device.type
    assert devices == {"first": "meta", "outside": "cpu", "second": "meta", "after": "cpu"}


def test_a_skeleton_has_real_buffers_and_no_large_parameter(make_dalle):
    config = make_dalle(attn_types=["axial_row"]).config
    with skeleton():
        net = DALLE(config, make_dalle().vae)
    real = {name for name, parameter in net.named_parameters() if not parameter.is_meta and not name.startswith("vae.")}
    assert all(net.get_parameter(name).ndim == 1 for name in real)
    assert not any(buffer.is_meta for buffer in net.buffers())
    assert torch.equal(net.rotary, make_dalle().rotary)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_of_before_the_group_foreign_loads(make_dalle, tmp_path, suffix):
    """Its config has the options of the group among the others: the same model, the same tokens."""
    dalle = make_dalle(
        layer_scale=True,
        reversible=True,
        divide_max=True,
        qkv_bias=True,
        rotate_values=True,
        attn_semantics="dalle_pytorch",
        rotary="dalle_pytorch",
        head_bias=False,
        bos=False,
    )
    assert all(asdict(dalle.config.foreign)[name] != value for name, value in asdict(ForeignConfig()).items())
    head, path = checkpoint.header(dalle), tmp_path / f"old{suffix}"
    head["config"] |= head["config"].pop("foreign")
    assert not any(isinstance(value, dict) for value in head["config"].values())
    state = checkpoint.distinct(dalle.state_dict())
    if suffix == ".safetensors":
        save_file(state, path, metadata={checkpoint.METADATA_KEY: json.dumps(head)})
    else:
        state = {f"net.{name}": tensor for name, tensor in state.items()}
        torch.save({**head, "state_dict": state, "pytorch-lightning_version": "2.0"}, path)
    loaded = checkpoint.load(path)
    assert loaded.config == dalle.config
    text, uniforms = torch.tensor([[3, 1, 4, 0]]), torch.rand(1, 16)
    drawn = [generate_image_tokens(model, text, uniforms, SamplingConfig()) for model in (dalle, loaded)]
    assert torch.equal(*drawn)
    head["config"]["foreign"] = {"qkv_bais": True}
    with pytest.raises(UserError, match="ForeignConfig has no qkv_bais"):
        checkpoint.config_of(head)


def test_token_shards_of_before_a_setting_existed_stay_valid(tiny_vae):
    """Their record holds a hash of all settings of then, which had no strides."""
    settings = vars(tiny_vae.config).copy()
    for name, value in checkpoint.CAME_LATER["vae"].items():
        assert settings.pop(name) == value
    then = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    assert checkpoint.describe_tokenizer(tiny_vae)["config_sha256"] == then
