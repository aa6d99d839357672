"""CLIP and SigLIP as transformers keeps them: outputs, text tokens and pictures of the package, and other folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from dalle_pytorch.checkpoints.checkpoint import assemble, load, save
from dalle_pytorch.checkpoints.importers import transformers_clip
from dalle_pytorch.models.pretrained_clip import PretrainedCLIP

COMMON = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
PIXELS: dict[str, dict[str, Any]] = {
    "transformers_clip": {
        **COMMON,
        "size": {"shortest_edge": 32},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
    },
    "transformers_siglip": {
        **COMMON,
        "size": {"height": 36, "width": 36},
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
}


@pytest.fixture(scope="session")
def script(reference_script):
    return reference_script("clip")


@pytest.fixture(scope="session")
def record(recorded):
    return recorded("clip")


def clip_vocabulary() -> Tokenizer:
    """100 words, of which the last two are the marks; its id 0 is a word."""
    words = {f"w{i}": i for i in range(98)}
    tokenizer = Tokenizer(models.WordLevel({**words, "<|startoftext|>": 98, "<|endoftext|>": 99}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    marks = [("<|startoftext|>", 98), ("<|endoftext|>", 99)]
    tokenizer.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", special_tokens=marks)
    return tokenizer


@pytest.fixture
def folder(tmp_path, script, record):
    """Write a folder as ``save_pretrained`` leaves it; keywords are changes of config.json."""

    def write(name: str, weights: str = "model.safetensors", **changes: Any) -> Path:
        state = script.stored(record[1], name)
        if weights == "model.safetensors":
            save_file(state, tmp_path / weights)
        elif weights == "pytorch_model.bin":
            torch.save(state, tmp_path / weights)
        else:
            parts = {key: f"model-0000{1 + key.startswith('vision')}-of-00002.safetensors" for key in state}
            for part in set(parts.values()):
                save_file({key: tensor for key, tensor in state.items() if parts[key] == part}, tmp_path / part)
            (tmp_path / weights).write_text(json.dumps({"metadata": {}, "weight_map": parts}))
        config = {**json.loads(record[1][f"{name}.config"]), **changes}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(PIXELS[name]))
        if "siglip" in name:
            (tmp_path / "tokenizer.json").write_text(record[1]["siglip_text.tokenizer"])
            (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
        else:
            clip_vocabulary().save(str(tmp_path / "tokenizer.json"))
        return tmp_path

    return write


def import_(path: Path) -> PretrainedCLIP:
    head, state = transformers_clip.convert(path)
    return assemble(head, state, path)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
@pytest.mark.parametrize("name", PIXELS)
def test_features_are_the_packages(script, record, folder, name, weights):
    clip = import_(folder(name, weights))
    script.compare(clip, record, name)
    assert clip.config.token_shift == (0 if "siglip" in name else 1)
    assert clip.config.image_size == (36 if "siglip" in name else 32)  # 4 of the 36 pixels are in no patch


def test_a_saved_one_comes_back_as_it_was(script, record, folder, tmp_path):
    clip = import_(folder("transformers_siglip"))
    save(clip, tmp_path / "clip.safetensors")
    again = load(tmp_path / "clip.safetensors", kind="clip")
    script.compare(again, record, "transformers_siglip")
    prompt, length = "A Red apple!", clip.config.text_len
    assert torch.equal(
        again.text_tokenizer.tokenize(prompt, length, True), clip.text_tokenizer.tokenize(prompt, length, True)
    )


def test_text_tokens_are_those_of_siglip_s_processor(record, folder):
    """SiglipTokenizer with its spiece.model, padded and cut; but a spelled "<pad>" is text in both."""
    clip = import_(folder("transformers_siglip"))
    clip.config.context_len = 16
    strings, ids = json.loads(record[1]["strings"]), json.loads(record[1]["siglip_text.ids"])
    tokens = clip.text_tokenizer.tokenize(strings, clip.config.text_len, truncate=True)
    assert clip.frame(tokens)[0].tolist() == ids
    assert max(len(row) - row.count(1) for row in ids) == 15  # one of them is cut


def test_text_of_a_vocabulary_without_padding_is_shifted_back(folder):
    clip = import_(folder("transformers_clip"))
    tokens = clip.text_tokenizer.tokenize("w0 w5 w97", clip.config.text_len)
    assert tokens.tolist() == [[1, 6, 98, 0, 0, 0]]
    framed, end = clip.frame(tokens)
    assert framed.tolist() == [[98, 0, 5, 97, 99, 99, 99, 99]]
    assert end.tolist() == [4]


def test_clip_s_own_vocabulary_is_known(folder, tmp_path):
    """As vocab.json, as tokenizer.json or not at all; another of the same size is not taken for it."""
    from dalle_pytorch.checkpoints.importers.clip_text import openai_tokenizer
    from dalle_pytorch.text import CLIPTokenizer

    vocab = CLIPTokenizer()._vocab
    assert isinstance(openai_tokenizer(tmp_path, 49_408), CLIPTokenizer)
    assert openai_tokenizer(tmp_path, 100) is None
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert isinstance(openai_tokenizer(tmp_path, 49_408), CLIPTokenizer)
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "a": vocab["b"], "b": vocab["a"]}))
    assert openai_tokenizer(tmp_path, 49_408) is None
    clip_vocabulary().save(str(tmp_path / "tokenizer.json"))
    assert openai_tokenizer(tmp_path, 49_408) is None


@pytest.mark.parametrize("name", PIXELS)
@pytest.mark.parametrize("size", [(50, 70), (71, 40), (20, 24)])
def test_pictures_are_those_of_the_processor(folder, name, size):
    """transformers resizes 8-bit pictures with PIL and rounds to 8 bits after each axis; we do not round."""
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    clip = import_(folder(name))
    processor = (SiglipImageProcessorPil if "siglip" in name else CLIPImageProcessorPil)(**PIXELS[name])
    levels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    theirs = torch.stack([torch.as_tensor(p) for p in processor(list(levels.numpy())).pixel_values])
    ours = clip.prepare(levels / 255)
    std = torch.tensor(PIXELS[name]["image_std"])[:, None, None]
    assert ((ours - theirs) * std * 255).abs().max() < 1.3  # of 255 levels, on noise


def test_other_models_and_settings_are_named(folder):
    for changes, message in (
        ({"model_type": "chinese_clip"}, "model_type 'chinese_clip' is not supported, only clip and siglip"),
        ({"model_type": "siglip2"}, "model_type 'siglip2'"),
        ({"text_config": {"hidden_act": "relu"}}, "text_config: hidden_act 'relu'"),
        ({"vision_config": {"image_size": 64}}, "image_size = 64"),
        ({"vision_config": {"image_size": 32, "hidden_size": 48}}, "image_width = 48, the weights 32"),
        ({"text_config_dict": {"num_hidden_layers": 3}}, "text_depth = 3, the weights 2"),
    ):
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            import_(folder("transformers_clip", **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "size="),
        ({"crop_size": 24}, "size="),
        ({"size": {"longest_edge": 32}}, "size="),
        ({"do_resize": False}, "do_resize=False"),
        ({"rescale_factor": 1.0}, "do_rescale=True"),
        ({"resample": 0}, "resample=0"),
        ({"size": {"height": 16, "width": 16}, "do_center_crop": False}, "image_size = 32"),
    ],
)
def test_what_is_done_to_pictures_and_not_supported_is_named(folder, change, message):
    path = folder("transformers_clip")
    (path / "preprocessor_config.json").write_text(json.dumps({**PIXELS["transformers_clip"], **change}))
    with pytest.raises(ValueError, match=message):
        import_(path)


def test_older_and_newer_spellings_of_pictures_are_read(folder, script, record):
    path = folder("transformers_clip")
    (path / "preprocessor_config.json").write_text(
        json.dumps({**PIXELS["transformers_clip"], "size": 32, "crop_size": 32})
    )
    assert import_(path).config.resize == "crop"
    (path / "preprocessor_config.json").unlink()
    (path / "processor_config.json").write_text(json.dumps({"image_processor": PIXELS["transformers_clip"]}))
    assert import_(path).config.mean == [0.5, 0.4, 0.3]
    (path / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config.json"):
        import_(path)


def test_misfits_are_named(folder, script, record):
    path = folder("transformers_clip")
    state, file = script.stored(record[1], "transformers_clip"), path / "model.safetensors"
    save_file({**state, "text_model.embeddings.position_ids": torch.arange(8)[None]}, file)
    script.compare(import_(path), record, "transformers_clip")  # older ones have these
    save_file({**state, "vision_model.encoder.layers.0.gate": torch.ones(4)}, file)
    with pytest.raises(ValueError, match=r"left over.*vision_model.encoder.layers.0.gate"):
        import_(path)
    gone = "text_model.encoder.layers.1.self_attn.k_proj.weight"
    save_file({key: tensor for key, tensor in state.items() if key != gone}, file)
    with pytest.raises(ValueError, match=r"text.blocks.1.qkv.weight: .*not all there"):
        import_(path)
    save_file({key: tensor for key, tensor in state.items() if key != "visual_projection.weight"}, file)
    with pytest.raises(ValueError, match=r"missing image.proj.weight"):
        import_(path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read: truncated"):
        import_(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no weights: none of model.safetensors"):
        import_(path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match=r"lists ../elsewhere.safetensors"):
        import_(path)
    (path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        import_(path)
    with pytest.raises(ValueError, match="give the folder"):
        import_(path / "config.json")


def test_a_tokenizer_of_another_model_or_none_is_named(folder):
    path = folder("transformers_siglip")
    (path / "tokenizer.json").unlink()
    (path / "spiece.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no tokenizer.json; .*T5Tokenizer"):
        import_(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.save(str(path / "tokenizer.json"))
    with pytest.raises(ValueError, match="more ids than the 100"):
        import_(path)
    Tokenizer(models.WordLevel({"w": 0}, unk_token="w")).save(str(path / "tokenizer.json"))
    with pytest.raises(ValueError, match="no end mark '</s>'"):
        import_(path)


def test_siglip_2_keeps_punctuation(folder):
    path = folder("transformers_siglip")
    content = (path / "tokenizer.json").read_text().replace("</s>", "<eos>")
    (path / "tokenizer.json").write_text(content)
    (path / "special_tokens_map.json").unlink()
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "pad_token": "<pad>"}))
    clip = import_(path)
    assert clip.text_tokenizer.clean("A Red,  Apple!") == "a red, apple!"
    assert (clip.config.end_id, clip.config.pad_id) == (1, 0)
