"""Captions that are wrong for their pictures."""

import random

import pytest

import dalle_pytorch
from dalle_pytorch.commands import train_clip, train_dalle
from dalle_pytorch.training.wrong_captions import swapped_captions, wrong_captions

STYLES = ["noto emoji", "twemoji", "big noto emoji"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat, noto emoji", ["a cat, twemoji", "a cat, big noto emoji"]),
        ("noto emoji of a cat", ["twemoji of a cat", "big noto emoji of a cat"]),
        ("a big noto emoji", ["a noto emoji", "a twemoji"]),  # the longest phrase is the one that it holds
        ("a cat", []),
    ],
)
def test_a_phrase_gives_way_to_every_other_one(caption, expected):
    assert swapped_captions(caption, STYLES) == expected


def test_a_wrong_caption_is_another_pictures_or_differs_by_its_phrase():
    captions = ["a cat, twemoji", "a dog", "a house, noto emoji", "a dog"]
    found = [set() for _ in captions]
    for seed in range(200):
        for row, wrong in zip(found, wrong_captions(captions, STYLES, random.Random(seed)), strict=True):
            row.add(wrong)
    assert found[0] == {"a cat, noto emoji", "a cat, big noto emoji", "a dog", "a house, noto emoji"}
    assert found[1] == found[3] == {"a cat, twemoji", "a house, noto emoji"}


def test_half_the_wrong_captions_differ_by_the_phrase():
    captions = [f"thing {i}, twemoji" for i in range(1000)]
    swapped = sum("noto" in wrong for wrong in wrong_captions(captions, STYLES, random.Random(0)))
    assert 420 < swapped < 580  # five standard deviations of 16


def test_equal_captions_have_no_wrong_one():
    assert wrong_captions(["a cat"] * 3, [], random.Random(0)) == ["a cat"] * 3


@pytest.mark.parametrize("phrases", ["[twemoji]", "[twemoji,twemoji]", "[twemoji,'']"])
@pytest.mark.parametrize("command", [train_dalle, train_clip])
def test_phrases_that_cannot_be_exchanged_are_refused(command, phrases, tmp_path, run_command):
    code, error = run_command(command.main, f"out={tmp_path}/run", f"contrast_phrases={phrases}")
    assert code in (1, 2)
    assert "contrast_phrases must be two or more different phrases" in error


COMMON = ["trainer=cpu", "data.batch_size=4", "trainer.max_steps=2", "trainer.enable_progress_bar=false"]
COMMON += ["trainer.log_every_n_steps=1"]
PHRASES = "contrast_phrases=[red,green,blue]"


def test_a_dalle_learns_from_wrong_captions(shards, vae_file, tmp_path, run_command):
    """Both trainings see the same batches and random numbers: what differs comes from the wrong captions."""
    results = []
    for name, weight in (("plain", 0), ("contrast", 0.5)):
        sizes = ["model.dim=16", "model.depth=1", "model.heads=2", "model.head_dim=8", "model.text_len=16"]
        out = tmp_path / name
        more = [f"vae={vae_file}", "text.vocab_size=270", f"model.contrast_weight={weight}", PHRASES]
        path = run_command(train_dalle.main, *COMMON, f"data.path={shards}", f"out={out}", *sizes, *more)
        results.append(dalle_pytorch.load(path, kind="dalle"))
        (log,) = out.glob("csv/*/metrics.csv")
        assert ("train/contrast" in log.read_text().splitlines()[0]) == bool(weight)
    plain, contrast = results
    assert contrast.config.contrast_weight == 0.5
    assert not plain.image_emb.weight.equal(contrast.image_emb.weight)


def test_a_clip_learns_from_wrong_captions(shards, tmp_path, run_command):
    results = []
    for name, more in (("plain", []), ("contrast", [PHRASES])):
        sizes = ["model.dim_text=16", "model.dim_image=16", "model.dim_latent=16", "model.text_enc_depth=1"]
        sizes += ["model.text_heads=2", "model.visual_enc_depth=1", "model.visual_heads=2", "model.text_len=16"]
        sizes += ["model.image_size=16", "model.patch_size=4", "text.vocab_size=270"]
        out = f"out={tmp_path / name}"
        results.append(
            dalle_pytorch.load(run_command(train_clip.main, *COMMON, f"data.path={shards}", out, *sizes, *more))
        )
    plain, contrast = results
    assert not plain.text_emb.weight.equal(contrast.text_emb.weight)
