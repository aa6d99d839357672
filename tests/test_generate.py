"""The generate command: files, metadata, repeatability, errors."""

import json
import re
import sys

import pytest
import torch
from PIL import Image

from dalle_pytorch import load, save
from dalle_pytorch.commands.generate import file_stem, main
from dalle_pytorch.data.images import to_pil
from dalle_pytorch.text import BPETokenizer

PROMPTS = ["a red apple", "a blue car"]


@pytest.fixture
def models(tmp_path, make_dalle, tiny_clip):
    """Paths of a small DALLE and CLIP that read prompts."""
    tokenizer = BPETokenizer.train(PROMPTS, 300)
    dalle = make_dalle(text_vocab_size=tokenizer.vocab_size, text_len=12, caption_dropout=0.1)
    clip = type(tiny_clip)(
        type(tiny_clip.config)(**{**vars(tiny_clip.config), "text_vocab_size": tokenizer.vocab_size})
    )
    dalle.text_tokenizer = clip.text_tokenizer = tokenizer
    save(dalle, tmp_path / "dalle.safetensors")
    save(clip, tmp_path / "clip.safetensors")
    return tmp_path


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    main()


def arguments(models, out: str, prompt: str = "|".join(PROMPTS)) -> list[str]:
    return [
        f"dalle={models}/dalle.safetensors",
        f"clip={models}/clip.safetensors",
        f'prompt="{prompt}"',
        "num_candidates=5",
        "num_keep=2",
        "sampling.top_k=6",
        "sampling.cfg_scale=2",
        f"out={models / out}",
    ]


def test_writes_ranked_pictures_that_can_be_redrawn(models, monkeypatch):
    run(monkeypatch, *arguments(models, "out"), "seed=3")
    out = models / "out"
    report = json.loads((out / "ranking.json").read_text())
    assert [row["prompt"] for row in report["prompts"]] == PROMPTS
    dalle = load(models / "dalle.safetensors")
    for row in report["prompts"]:
        assert len(row["all_scores"]) == 5
        best = sorted(row["all_scores"], reverse=True)[:2]
        assert [kept["score"] for kept in row["kept"]] == best
        for kept in row["kept"]:
            with Image.open(out / kept["file"]) as picture:
                settings = json.loads(picture.text["dalle_pytorch"])
                pixels = picture.convert("RGB").tobytes()
            assert settings["prompt"] == row["prompt"]
            assert settings["seed"] == 3
            assert settings["sampling"]["top_k"] == 6
            with torch.no_grad():
                redrawn = dalle.vae.decode(torch.tensor([kept["image_tokens"]]))[0]
            assert to_pil(redrawn).tobytes() == pixels
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 128
        assert grid.height > 2 * 128


def test_same_seed_same_pictures_at_any_batch_size(models, monkeypatch):
    for name, extra in (("a", ["seed=1"]), ("b", ["seed=1", "batch_size=2"]), ("c", ["seed=2"])):
        run(monkeypatch, *arguments(models, name), *extra)
    files = {name: sorted(path.name for path in (models / name).glob("*.png")) for name in "abc"}
    assert files["a"] == files["b"] == files["c"]
    tokens = {}
    for name in "abc":
        report = json.loads((models / name / "ranking.json").read_text())
        tokens[name] = [kept["image_tokens"] for row in report["prompts"] for kept in row["kept"]]
    assert tokens["a"] == tokens["b"] != tokens["c"]


def test_prompts_from_a_file_and_without_a_ranker(models, monkeypatch):
    (models / "prompts.txt").write_text("a red apple\n\na blue car\n")
    run(
        monkeypatch,
        f"dalle={models}/dalle.safetensors",
        f"prompts_file={models}/prompts.txt",
        "num_candidates=2",
        "num_keep=2",
        f"out={models}/out",
    )
    report = json.loads((models / "out" / "ranking.json").read_text())
    assert [row["prompt"] for row in report["prompts"]] == PROMPTS
    assert report["prompts"][0]["all_scores"] is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (['prompt=" | "'], "no prompt"),
        (["prompts_file=nowhere.txt", "prompt=null"], "nowhere.txt"),
        (["dalle=nowhere.safetensors"], "nowhere.safetensors"),
        (["num_keep=9"], r"num_keep \(9\)"),
        (["sampling.top_p=0"], "top_p"),
        (["sampling.topk=3"], "sampling.top_k"),
        (['prompt="a red apple a red apple a red apple a red apple"'], "a red apple a red"),
    ],
)
def test_misuse_is_named_and_leaves_nothing(models, monkeypatch, capsys, extra, message):
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, *arguments(models, "out"), *extra)
    assert exit_info.value.code in (1, 2)
    assert re.search(message, capsys.readouterr().err)
    assert not (models / "out").exists()


def test_results_are_not_overwritten(models, monkeypatch, capsys):
    run(monkeypatch, *arguments(models, "out"))
    before = (models / "out" / "ranking.json").read_bytes()
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments(models, "out"), "seed=9")
    assert "holds files already" in capsys.readouterr().err
    assert (models / "out" / "ranking.json").read_bytes() == before


def test_file_names_are_safe():
    assert file_stem(3, "/../etc/Passwd: x") == "03_etc-passwd-x"
    assert file_stem(0, "猫") == "00"
