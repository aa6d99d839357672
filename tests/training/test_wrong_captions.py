"""Captions that are wrong for their pictures: which, how they are read, what trainings make of them."""

import csv
import random
from types import SimpleNamespace

import pytest
import torch

import dalle_pytorch
from dalle_pytorch import CLIP, CLIPConfig
from dalle_pytorch.commands import train_clip, train_dalle
from dalle_pytorch.config import ConfigError
from dalle_pytorch.text import BPETokenizer
from dalle_pytorch.text.phrases import swapped_captions
from dalle_pytorch.training.clip import LitCLIP, TrainCLIPConfig
from dalle_pytorch.training.dalle import LitDALLE, TrainDALLEConfig
from dalle_pytorch.training.wrong_captions import check_held, read_wrong, wrong_caption

STYLES = ["noto emoji", "twemoji", "big noto emoji"]
BATCH = ["a cat, twemoji", "a dog", "a house, noto emoji", "a dog"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat, noto emoji", ["a cat, twemoji", "a cat, big noto emoji"]),
        ("noto emoji of a cat", ["twemoji of a cat", "big noto emoji of a cat"]),
        ("a big noto emoji", ["a noto emoji", "a twemoji"]),  # the longest phrase is the one that it holds
        ("a cat", []),
        ("a twemojist", []),  # whole words
    ],
)
def test_a_phrase_gives_way_to_every_other_one(caption, expected):
    assert swapped_captions(caption, STYLES) == expected


def test_a_wrong_caption_is_another_pictures_or_differs_by_its_phrase():
    found = {
        caption: {wrong_caption(caption, sorted(set(BATCH)), STYLES, random.Random(seed)) for seed in range(100)}
        for caption in BATCH
    }
    assert found["a cat, twemoji"] == {"a cat, noto emoji", "a cat, big noto emoji", "a dog", "a house, noto emoji"}
    assert found["a dog"] == {"a cat, twemoji", "a house, noto emoji"}


def test_half_the_wrong_captions_of_those_with_a_phrase_differ_by_it():
    captions = sorted(f"thing {i}, twemoji" for i in range(1000))
    swapped = sum("noto" in wrong_caption(c, captions, STYLES, random.Random(c)) for c in captions)
    assert 420 < swapped < 580  # five standard deviations of 16


def test_equal_captions_have_no_wrong_one():
    assert wrong_caption("a cat", ["a cat"], [], random.Random(0)) == "a cat"


def test_wrong_captions_are_read_as_right_ones():
    """With dropout as with it, cut where too long; those that a cut makes equal do not differ."""
    tokenizer = BPETokenizer.train(BATCH * 9, 400)
    captions, own = ["a cat, noto emoji", "a dog"], ["a cat, twemoji", "a dog"]

    def read(length, dropout):
        rngs = [random.Random(place) for place in range(2)]
        return read_wrong(captions, own, tokenizer, length, dropout=dropout, rngs=rngs)

    plain, differ = read(24, 0.0)
    assert differ.tolist() == [True, False]
    assert torch.equal(plain, tokenizer.tokenize(captions, 24))
    dropped, differ = read(24, 0.999)
    assert ((dropped > 0).sum(dim=1) > (plain > 0).sum(dim=1)).all()
    assert [tokenizer.decode(row) for row in dropped.tolist()] == captions
    assert differ.tolist() == [True, False]
    cut = len(tokenizer.encode("a cat,"))
    assert read(cut, 0.0)[1].tolist() == [False, False]


def batch_of(captions, tokenizer):
    return {
        "captions": list(captions),
        "indices": torch.arange(len(captions)) + 7,
        "text_tokens": tokenizer.tokenize(list(captions), 24),
    }


def test_wrong_text_of_a_dalle_is_a_function_of_seed_step_and_sample(make_dalle, monkeypatch):
    tokenizer = BPETokenizer.train(BATCH * 9, 400)
    dalle = make_dalle(text_vocab_size=400, text_len=24)
    dalle.text_tokenizer = tokenizer
    step = [0]
    monkeypatch.setattr(LitDALLE, "global_step", property(lambda self: step[0]))
    module = LitDALLE(dalle, TrainDALLEConfig(contrast_phrases=STYLES, out="x"))
    module.trainer = SimpleNamespace(world_size=1)
    batch = batch_of(BATCH, tokenizer)
    first = module.wrong_text(batch, 0)
    assert torch.equal(first, module.wrong_text(batch, 0))
    back = {key: value.flip(0) if torch.is_tensor(value) else value[::-1] for key, value in batch.items()}
    assert torch.equal(module.wrong_text(back, 0).flip(0), first)
    found = set()
    for step[0] in range(60):
        rows = module.wrong_text(batch, 0)
        assert (rows != batch["text_tokens"]).any(dim=1).all()
        found.add(tokenizer.decode(rows[0].tolist()))
    assert found == {"a cat, noto emoji", "a cat, big noto emoji", "a dog", "a house, noto emoji"}
    alone = batch_of(["a dog"], tokenizer)
    assert torch.equal(module.wrong_text(alone, 0), alone["text_tokens"])


def test_wrong_text_of_a_clip_stands_beside_its_own_picture(monkeypatch):
    tokenizer = BPETokenizer.train(BATCH * 9, 400)
    sizes = {"dim_text": 16, "dim_image": 16, "dim_latent": 16, "text_enc_depth": 1, "text_heads": 2}
    clip = CLIP(
        CLIPConfig(
            **sizes, visual_enc_depth=1, visual_heads=2, image_size=16, patch_size=8, text_len=24, text_vocab_size=400
        )
    )
    clip.text_tokenizer = tokenizer
    monkeypatch.setattr(LitCLIP, "global_step", 0)
    module = LitCLIP(clip, TrainCLIPConfig(contrast_phrases=STYLES, out="x"))
    module.trainer = SimpleNamespace(world_size=1)
    batch = {**batch_of(BATCH, tokenizer), "images": torch.rand(4, 3, 16, 16)}
    wrong = module.wrong_text(batch, 0)
    assert torch.equal(wrong[0], tokenizer.tokenize(["a cat, noto emoji", "a cat, big noto emoji"], 24))
    assert torch.equal(wrong[2], tokenizer.tokenize(["a house, twemoji", "a house, big noto emoji"], 24))
    assert not wrong[[1, 3]].any()
    # the loss by hand: a picture chooses among all captions and its own wrong ones, a caption among all pictures
    scores = clip.logit_scale * clip.scores(batch["text_tokens"], batch["images"])
    expected = 0.0
    for place in range(4):
        more = (
            [] if not wrong[place].any() else [clip.logit_scale * clip.scores(wrong[place], batch["images"])[:, place]]
        )
        choice = torch.cat([scores[:, place], *more])
        expected += choice.logsumexp(0) + scores[place].logsumexp(0) - 2 * scores[place, place]
    torch.testing.assert_close(module.loss(batch, wrong).loss, expected / 8)


def test_phrases_that_no_caption_holds_are_named():
    check_held([], [])
    check_held(["a dog", "noto emoji"], BATCH)
    with pytest.raises(ConfigError, match="holds 'emoji'"):
        check_held(["noto emoji", "emoji"], BATCH)  # it stands in the longer one only
    with pytest.raises(ConfigError, match=r"none of 4 training captions holds 'Twemoji', 'openmoji'"):
        check_held(["noto emoji", "Twemoji", "openmoji"], BATCH)


@pytest.mark.parametrize("phrases", ["[twemoji]", "[twemoji,twemoji]", "[twemoji,'']"])
@pytest.mark.parametrize("command", [train_dalle, train_clip])
def test_phrases_that_cannot_be_exchanged_are_refused(command, phrases, tmp_path, run_command):
    code, error = run_command(command.main, f"out={tmp_path}/run", f"contrast_phrases={phrases}")
    assert code in (1, 2)
    assert "contrast_phrases must be two or more different phrases" in error


COMMON = ["trainer=cpu", "data.batch_size=4", "trainer.max_steps=2", "trainer.enable_progress_bar=false"]
COMMON += ["trainer.log_every_n_steps=1"]
PHRASES = "contrast_phrases=[red,green,blue]"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([PHRASES], "changes nothing while model.contrast_weight is 0"),
        ([PHRASES, "model=dalle_mini"], "contrast_phrases is not there for a DALL·E mini"),
        (["model.contrast_weight=0.3", "data.batch_size=1"], "no other picture's caption"),
        (["model.contrast_weight=0.3", "contrast_phrases=[red,pink]"], "training captions holds 'pink'"),
        (["model.contrast_weight=-1"], "contrast_weight must not be negative"),
        (["model.contrast_scale=0"], "contrast_scale must be positive"),
    ],
)
def test_settings_without_effect_are_refused(shards, vae_file, tmp_path, run_command, more, message):
    where = [f"data.path={shards}", f"out={tmp_path}/run", f"vae={vae_file}", "text.vocab_size=270"]
    code, error = run_command(train_dalle.main, *COMMON, *where, *more)
    assert code in (1, 2)
    assert message in error


def test_a_dalles_loss_holds_the_contrast(shards, vae_file, tmp_path, run_command):
    sizes = ["model.dim=16", "model.depth=1", "model.heads=2", "model.head_dim=8", "model.text_len=16"]
    where = [f"data.path={shards}", f"out={tmp_path}/run", f"vae={vae_file}", "text.vocab_size=270"]
    path = run_command(train_dalle.main, *COMMON, *where, *sizes, "model.contrast_weight=0.5", PHRASES)
    assert dalle_pytorch.load(path, kind="dalle").config.contrast_weight == 0.5
    (log,) = (tmp_path / "run").glob("csv/*/metrics.csv")
    with log.open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(rows) == 2
    for row in rows:
        loss, text, image, contrast = (float(row[f"train/{name}"]) for name in ("loss", "text", "image", "contrast"))
        assert contrast > 0.5  # untrained: softplus of next to nothing, 0.69
        assert loss == pytest.approx((text + 7 * image) / 8 + 0.5 * contrast, rel=1e-5)


def test_a_clip_learns_from_wrong_captions(shards, tmp_path, run_command):
    results = []
    for name, more in (("plain", []), ("contrast", [PHRASES])):
        sizes = ["model.dim_text=16", "model.dim_image=16", "model.dim_latent=16", "model.text_enc_depth=1"]
        sizes += ["model.text_heads=2", "model.visual_enc_depth=1", "model.visual_heads=2", "model.text_len=16"]
        sizes += ["model.image_size=16", "model.patch_size=4", "text.vocab_size=270"]
        where = [f"data.path={shards}", f"out={tmp_path / name}"]
        results.append(dalle_pytorch.load(run_command(train_clip.main, *COMMON, *where, *sizes, *more)))
    plain, contrast = results
    assert not plain.text_emb.weight.equal(contrast.text_emb.weight)
