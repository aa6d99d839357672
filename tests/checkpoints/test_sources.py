"""Which format a file or folder is found to be of, and every released model by its name."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import dalle_pytorch
from dalle_pytorch.checkpoints import hub, sources
from dalle_pytorch.checkpoints.checkpoint import KINDS
from dalle_pytorch.checkpoints.importers import openai_dvae

FOLDERS = {
    "openai_dvae": ("encoder.pkl", "decoder.pkl"),
    "min_dalle": ("encoder_mini.pt", "decoder_mini.pt", "vocab_mini.json", "merges_mini.txt", "detoker.pt"),
    "dalle_mini": (
        *("config.json", "enwiki-words-frequency.txt", "flax_model.msgpack", "merges.txt", "special_tokens_map.json"),
        *("tokenizer.json", "tokenizer_config.json", "vocab.json"),
    ),
    "mindalle": (
        *("config.yaml", "stage1_last.ckpt", "stage2_last.ckpt"),
        *("tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"),
    ),
    "open_clip": (
        *("open_clip_config.json", "open_clip_model.safetensors", "config.json", "model.safetensors"),
        *("preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt"),
    ),
    "transformers_clip": (  # as openai/clip-vit-base-patch32 has them
        *("config.json", "flax_model.msgpack", "merges.txt", "model.safetensors", "preprocessor_config.json"),
        *("pytorch_model.bin", "special_tokens_map.json", "tf_model.h5", "tokenizer.json", "vocab.json"),
    ),
}
"""What the folders of each format hold on the hub or in the package's cache."""
MODEL_TYPES = {"dalle_mini": "dallebart", "transformers_clip": "clip", "open_clip": "clip"}


def write_folder(folder: Path, name: str, model_type: str | None) -> Path:
    for file in FOLDERS[name]:
        (folder / file).parent.mkdir(exist_ok=True, parents=True)
        (folder / file).write_text(
            json.dumps({"model_type": model_type} if file == "config.json" and model_type else {})
        )
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_found_out(tmp_path, name):
    assert sources.find(write_folder(tmp_path, name, MODEL_TYPES.get(name))) == name


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_a_folder_of_transformers_is_never_a_dalle_mini(tmp_path, name):
    write_folder(tmp_path, "transformers_clip", name)
    if name == "siglip":
        assert sources.find(tmp_path) == "transformers_clip"
    else:
        with pytest.raises(ValueError, match="of no known format"):
            sources.find(tmp_path)


def test_a_dalle_mini_need_not_say_its_type(tmp_path):
    assert sources.find(write_folder(tmp_path, "dalle_mini", None)) == "dalle_mini"


@pytest.fixture
def states(recorded) -> dict[str, dict[str, Tensor]]:
    """Weights under the names of each format of files."""

    def empty(shapes) -> dict[str, Tensor]:
        return {key: torch.zeros(shape) for key, shape in shapes.items()}

    def notes(name):
        return recorded(name)[1]

    dalles, vaes = (json.loads(notes("dalle_pytorch")[kind]) for kind in ("dalles", "vaes"))
    clip = empty(json.loads(notes("clip")["openai_vit.shapes"]))
    scalars = {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}
    siglip = empty(json.loads(notes("clip")["open_clip_siglip.shapes"]))
    return {
        "taming": empty(json.loads(notes("taming")["small"])["vq"]),
        "taming gumbel": empty(json.loads(notes("taming")["small"])["gumbel"]),
        "llamagen": empty(json.loads(notes("llamagen")["small"])),
        **{f"dalle_pytorch {name}": empty(case["shapes"]) for name, case in {**dalles, **vaes}.items()},
        "openai_clip": clip | scalars,
        "open_clip": siglip,
        "plain clip": clip,
    }


@pytest.mark.parametrize("where", [None, "state_dict", "model", "weights"])
def test_files_are_found_out(tmp_path, states, where):
    for name, state in states.items():
        torch.save(state if where is None else {where: state, "epoch": 3}, tmp_path / "file.pt")
        if name == "plain clip":  # open_clip's are the same; its activation may be another
            with pytest.raises(ValueError, match=r"file\.pt could be openai_clip or open_clip; say which with source="):
                sources.find(tmp_path / "file.pt")
        else:
            assert sources.find(tmp_path / "file.pt") == name.split()[0]


@pytest.fixture
def releases(tmp_path, monkeypatch, states, recorded, reference_script, min_dalle_files, archive) -> None:
    """A cache that holds small files of every release under their names."""
    snapshot = min_dalle_files(tmp_path / "snapshot", weights=True)
    monkeypatch.setattr(hub, "CACHE", tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(snapshot))
    for name, release in hub.RELEASES.items():
        if release.urls:
            (tmp_path / name).mkdir()
    shapes = json.loads(recorded("openai_dvae")[1]["small"])
    for part in ("encoder", "decoder"):
        state = {key: torch.empty(shape) for key, shape in shapes[part].items()}
        reference_script("openai_dvae").fill(part, state)
        torch.save(state, tmp_path / "openai_dvae" / f"{part}.pkl")
    torch.save({"state_dict": states["taming"]}, tmp_path / "vqgan_f16_1024/vqgan.ckpt")
    net = {
        "double_z": False, "z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [16],
    }  # fmt: skip
    params = {"embed_dim": 6, "n_embed": 64, "ddconfig": net}
    config = {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}
    (tmp_path / "vqgan_f16_1024/vqgan.yaml").write_text(yaml.safe_dump(config))
    archive(states["openai_clip"], tmp_path / "clip_vit_b32/ViT-B-32.pt")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_every_release_loads_by_its_name(releases):
    kinds = {"openai_dvae": "vae", "vqgan_f16_1024": "vae", "clip_vit_b32": "clip"}
    assert hub.RELEASES.keys() == {"emoji", "dalle_mini", "dalle_mega", *kinds}
    for name in hub.RELEASES:
        model = dalle_pytorch.load(name, kind=kinds.get(name, "dalle"))
        head = dalle_pytorch.checkpoints.loading.read_header(name)
        assert isinstance(model, KINDS[head["kind"]].model)
        if name == "vqgan_f16_1024":
            assert model.image_size == 32  # as the yaml says


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_released_tokenizers_take_a_config_alone(releases, tmp_path):
    """VQGanVAE's second argument without its first is compared with the released weights."""
    config = yaml.safe_load((tmp_path / "vqgan_f16_1024/vqgan.yaml").read_text())
    config["model"]["params"]["n_embed"] = 65
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
    assert dalle_pytorch.compat.pretrained_vaes.VQGanVAE().image_size == 32
    assert dalle_pytorch.compat.pretrained_vaes.OpenAIDiscreteVAE(image_size=32).image_size == 32
    with pytest.raises(ValueError, match=r"other\.yaml is not the config of .*n_embed 65"):
        dalle_pytorch.compat.pretrained_vaes.VQGanVAE(None, tmp_path / "other.yaml")


def test_every_source_can_be_found(states):
    assert {*FOLDERS, *(name.split()[0] for name in states), openai_dvae.__name__.rsplit(".", 1)[-1]} - {"plain"} == {
        *sources.SOURCES
    }
