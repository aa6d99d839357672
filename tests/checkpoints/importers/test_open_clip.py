"""open_clip's CLIPs and SigLIPs: outputs of the package, its folders and checkpoints, and settings we do not have."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dalle_pytorch.checkpoints.checkpoint import assemble
from dalle_pytorch.checkpoints.importers import open_clip, openai_clip
from dalle_pytorch.models.pretrained_clip import PretrainedCLIP

PIXELS = {"size": 32, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
          "resize_mode": "squash", "fill_color": 0}  # fmt: skip


@pytest.fixture(scope="session")
def script(reference_script):
    return reference_script("clip")


@pytest.fixture(scope="session")
def record(recorded):
    return recorded("clip")


@pytest.fixture
def folder(tmp_path, script, record):
    """Write a folder as the hub has it: the config, the weights, and SigLIP's tokenizer."""

    def write(name: str, weights: str = "open_clip_model.safetensors", **settings: Any) -> Path:
        config = {"model_cfg": json.loads(record[1][f"{name}.config"]), "preprocess_cfg": PIXELS, **settings}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").write_text(record[1]["siglip_text.tokenizer"])
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "</s>"}))
        state = script.stored(record[1], name)
        save_file(state, tmp_path / weights) if weights.endswith("s") else torch.save(state, tmp_path / weights)
        return tmp_path

    return write


def import_(path: Path, **options: Any) -> PretrainedCLIP:
    head, state = open_clip.convert(path, **options)
    return assemble(head, state, path)


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@pytest.mark.parametrize("name", ["open_clip", "open_clip_custom", "open_clip_siglip"])
def test_features_are_the_packages(script, record, folder, name, weights):
    clip = import_(folder(name, weights))
    script.compare(clip, record, name)
    assert (clip.config.text_activation == "quick_gelu") == (name == "open_clip_custom")
    assert (clip.logit_bias is not None) == ("siglip" in name)


def test_a_checkpoint_of_a_training_needs_its_config(tmp_path, script, record):
    """Lightning's and open_clip's layout, {"state_dict": {"module.*"}}, with a config of open_clip's model_configs/."""
    state = {f"module.{key}": tensor for key, tensor in script.stored(record[1], "open_clip").items()}
    path, config = tmp_path / "epoch_1.pt", tmp_path / "ViT.json"
    torch.save({"epoch": 1, "name": "run", "state_dict": state, "optimizer": {"state": {}}}, path)
    config.write_text(record[1]["open_clip.config"])
    script.compare(import_(path, config=config), record, "open_clip")
    with pytest.raises(ValueError, match=r"epoch_1.pt: weights alone do not tell.*config="):
        import_(path)


def test_a_resnet_has_openais_layout(tmp_path, script, record):
    state, path, config = script.stored(record[1], "openai_resnet"), tmp_path / "rn.pt", tmp_path / "rn.json"
    torch.save(state, path)
    vision = {"image_size": 64, "layers": [2, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 100, "width": 64, "heads": 1, "layers": 2}
    settings = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    config.write_text(json.dumps(settings))
    script.compare(import_(path, config=config), record, "openai_resnet")
    assert open_clip.convert(path, config=config)[0] == openai_clip.convert(path)[0]


def test_pictures_and_text_are_prepared_as_the_config_says(folder):
    clip = import_(folder("open_clip_siglip"))
    config = clip.config
    assert (config.resize, config.interpolation, config.mean, config.std) == ("squash", "bicubic", [0.5] * 3, [0.5] * 3)
    assert (config.start_id, config.end_id, config.pad_id, config.token_shift) == (None, 1, 1, 0)
    assert (config.image_activation, config.text_activation) == ("gelu", "gelu_tanh")
    assert clip.text_tokenizer.clean("A_red,  &amp; Apple!") == "a red apple"


@pytest.mark.parametrize(
    ("name", "tanh", "heads"),
    [("base_patch16_siglip_512", False, 12), ("base_patch32_siglip_256", True, 12),
     ("large_patch16_siglip_384", False, 16),
     ("large_patch16_siglip_512", True, 16), ("so400m_patch14_siglip_384", False, 16),
     ("so400m_patch16_siglip_256", True, 16), ("giantopt_patch16_siglip_256", True, 16)],
)  # fmt: skip
def test_timm_s_names_tell_heads_and_activation(name, tanh, heads):
    """As ``vit_*_siglip_*`` of timm/models/vision_transformer.py."""
    fields = open_clip.image_fields({"embed_dim": 8, "vision_cfg": {"timm_model_name": f"vit_{name}"}})
    assert fields["image_heads"] == heads
    assert fields["image_activation"] == ("gelu_tanh" if tanh else "gelu")


@pytest.mark.parametrize(
    ("section", "setting", "message"),
    [
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool=True"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type='avg'"),
        ("vision_cfg", {"no_ln_pre": True}, "no_ln_pre=True"),
        ("vision_cfg", {"timm_model_name": "convnext_base"}, "convnext_base"),
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "avg"}, "timm_pool='map'"),
        ("vision_cfg", {"image_size": [32, 64]}, r"\[32, 64\]"),
        ("vision_cfg", {"width": 64}, "image_width = 64, the weights 48"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "hf_model_name='roberta-base'"),
        ("text_cfg", {"embed_cls": True}, "embed_cls=True"),
        ("text_cfg", {"pool_type": "first"}, "pool_type='first'"),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}, "tokenizer_kwargs"),
        ("text_cfg", {"act_kwargs": {"alpha": 1}}, "act_kwargs"),
        ("text_cfg", {"hf_tokenizer_name": "x"}, "pool_type='argmax' does not go with"),
        ("multimodal_cfg", {"width": 8}, "multimodal_cfg"),
    ],
)
def test_settings_that_our_towers_do_not_have_are_named(folder, record, section, setting, message):
    model = copy.deepcopy(json.loads(record[1]["open_clip.config"]))
    model[section] = {**model.get(section, {}), **setting}
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        import_(folder("open_clip", model_cfg=model))


def test_pictures_of_another_kind_are_named(folder):
    for settings in ({"resize_mode": "longest"}, {"interpolation": "random"}, {"size": 64}):
        with pytest.raises(ValueError, match=f"preprocess_cfg: .*{next(iter(settings.values()))}"):
            import_(folder("open_clip", preprocess_cfg={**PIXELS, **settings}))
    with pytest.raises(ValueError, match="no preprocess_cfg"):
        import_(folder("open_clip_siglip", preprocess_cfg=None))


def test_misfits_are_named(folder, script, record):
    path = folder("open_clip")
    state: dict[str, Tensor] = script.stored(record[1], "open_clip")
    file = path / "open_clip_model.safetensors"
    save_file({**state, "text_decoder.ln_final.weight": torch.ones(4)}, file)
    with pytest.raises(ValueError, match=r"left over.*text_decoder.ln_final.weight"):
        import_(path)
    save_file({key: tensor for key, tensor in state.items() if key != "visual.ln_pre.bias"}, file)
    with pytest.raises(ValueError, match=r"missing image.norm_pre.bias"):
        import_(path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors cannot be read: truncated"):
        import_(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: none of open_clip_model.safetensors"):
        import_(path)
    torch.save({"encoder.weight": torch.ones(2)}, path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="not a CLIP of open_clip"):
        import_(path)
    (path / "open_clip_config.json").write_text(json.dumps({"vision_cfg": {}, "text_cfg": {}}))
    (path / "open_clip_pytorch_model.bin").unlink()
    save_file(state, path / "model.safetensors")
    with pytest.raises(ValueError, match="no embed_dim"):
        import_(path)
    (path / "open_clip_config.json").write_text('{"model_cfg": ')
    with pytest.raises(ValueError, match=r"open_clip_config.json is not JSON"):
        import_(path)
