"""What an experiment says, and what the arms of the bundled ones are made of."""

import functools
import math

import pytest
import torch
from hydra import compose, initialize_config_dir

from dalle_pytorch import CLIP, CLIPConfig
from dalle_pytorch.commands import train_clip, train_dalle, train_vae
from dalle_pytorch.config import CONFIGS, typed
from dalle_pytorch.evaluation.retrieval import DISTRACTORS
from dalle_pytorch.text import BPETokenizer
from dalle_pytorch.training.clip import TrainCLIPConfig
from dalle_pytorch.training.dalle import TrainDALLEConfig
from dalle_pytorch.training.vae import TrainVAEConfig
from replication import __main__ as replicate
from replication import clips, dalles, drawn
from replication.arms import RUNS, Job, function, settings_of, slug
from replication.drawn import DrawnConfig
from replication.experiment import Claim, Number, ReplicateConfig, numbers, parse
from replication.pictures import EMOJI, read
from replication.powersgd import PowerSGDConfig
from replication.underflow import UnderflowConfig

NAMES = sorted(path.name.removesuffix(".yaml") for path in (CONFIGS / "replicate/experiment").iterdir())
COMMANDS = {"vae": (train_vae, TrainVAEConfig), "dalle": (train_dalle, TrainDALLEConfig),
            "clip": (train_clip, TrainCLIPConfig)}  # fmt: skip
OWN = {"drawn": DrawnConfig, "underflow": UnderflowConfig, "powersgd": PowerSGDConfig}
assert replicate.main
NEEDED = {"claim": "c", "source": "s", "run": "vae", "name": "n"}


SIZE = 16
"""Of images in these tests."""
read = functools.cache(read)


def load(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(compose("replicate", overrides=[f"experiment={name}"]), ReplicateConfig)


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_of_the_bundled_experiments_has_settings_that_exist(name):
    config = load(name)
    assert config.name == name
    assert function(config.run, "run") is not None
    assert len({slug(arm) for arm in config.arms}) == len(config.arms)
    for settings in config.arms.values():
        together = [*config.base, *settings]
        if config.run in COMMANDS:
            module, cls = COMMANDS[config.run]
            assert module.main
            overrides = [
                "experiment=replicate",
                "data.path=x",
                *(["vae=x"] if config.run == "dalle" else []),
                *together,
            ]
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                typed(compose(f"train_{config.run}", overrides=overrides), cls)
        else:
            assert settings_of(OWN[config.run], together)


@pytest.mark.parametrize("name", NAMES)
def test_arms_of_an_experiment_differ(name):
    arms = [tuple(settings) for settings in load(name).arms.values()]
    assert len(set(arms)) == len(arms)


def test_expectations_are_pairs_of_neighbours():
    a, b = Number("psnr", "1/16"), Number("psnr", "row, column")
    assert parse("psnr[1/16] > psnr[row, column]") == [Claim(a, b)]
    assert parse("psnr[1/16] < psnr[row, column] < 3.5") == [Claim(3.5, b), Claim(b, a)]


@pytest.mark.parametrize("text", ["psnr[a]", "psnr[a] > psnr[b] < 3", "psnr[a] >= 3", "psnr a > 3", "", "x[] > 2"])
def test_an_expectation_that_cannot_be_read_is_quoted(text):
    with pytest.raises(ValueError, match="is not like"):
        parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": {}}, "must not be empty"),
        ({"arms": {"a": []}, "seeds": []}, "must not be empty"),
        ({"arms": {"a": []}, "seeds": [1, 1]}, r"seeds must differ, got \[1, 1\]"),
        ({"arms": {"a": []}, "jobs": 0}, "jobs must be at least 1, got 0"),
        ({"arms": {"a": [], "b": []}, "expect": ["l1[c] > l1[a]"]}, "names the arm 'c'; there are a, b"),
    ],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ReplicateConfig(**NEEDED, **change)


def test_every_run_has_its_module():
    for run in RUNS:
        assert callable(function(run, "run"))


def test_an_unknown_run_or_setting_is_named():
    with pytest.raises(ValueError, match="run=vea is unknown; there are vae"):
        function("vea", "run")
    with pytest.raises(ValueError, match="num_candidate"):
        settings_of(DrawnConfig, ["num_candidate=3"])
    with pytest.raises(ValueError, match="many"):
        settings_of(DrawnConfig, ["num_candidates=many"])


def test_held_out_pairs_are_asked_for_with_words_that_no_training_picture_has():
    trained = {caption for meta in read(EMOJI, "train", SIZE, caption=0).metas for caption in meta["captions"]}
    for name in ("composition", "reranking"):
        config = load(name)
        for arm, settings in config.arms.items():
            drawn_of = settings_of(DrawnConfig, [*config.base, *settings])
            asked = set(read(EMOJI, drawn_of.split, SIZE, caption=drawn_of.caption).captions)
            assert (asked & trained == set()) == (arm != "known captions"), (name, arm)
            assert len(asked) >= DISTRACTORS


WORDS = BPETokenizer.train(["a red apple", "a blue heart"], 270)


def of_run(name):
    """The numbers that the experiments of a run show or expect something of."""
    configs = [config for config in map(load, NAMES) if config.run == name]
    said = {
        number.metric
        for config in configs
        for text in config.expect
        for claim in parse(text)
        for side in claim
        for number in numbers(side)
    }
    return configs, said.union(*(config.shown for config in configs))


@pytest.fixture
def job(tmp_path):
    def make(run, settings):
        return Job(run, tuple(settings), 0, tmp_path, tmp_path, 1)

    return make


def test_a_dalle_gives_the_numbers_that_its_experiments_name(monkeypatch, make_dalle, job):
    dalle = make_dalle(text_vocab_size=WORDS.vocab_size, text_len=8)
    dalle.text_tokenizer = WORDS
    monkeypatch.setattr(dalles, "trained", lambda job: "")
    monkeypatch.setattr(dalles.checkpoint, "load", lambda path, kind: dalle)
    found = dalles.run(job("dalle", [])).numbers
    assert of_run("dalle")[1] <= set(found)
    assert all(value > 0 for value in found.values())


def test_a_clip_gives_the_numbers_that_its_experiments_name(monkeypatch, job):
    clip = small_clip(0)
    monkeypatch.setattr(clips, "train", lambda *arguments: "")
    monkeypatch.setattr(clips.checkpoint, "load", lambda path, kind: clip)
    assert of_run("clip")[1] <= set(clips.run(job("clip", [])).numbers)


@pytest.mark.usefixtures("unchecked_shapes")
def test_drawn_pictures_give_the_numbers_that_their_experiments_name(monkeypatch, make_dalle, job):
    dalle = make_dalle(text_vocab_size=WORDS.vocab_size, text_len=8, caption_dropout=0.1)
    dalle.text_tokenizer = WORDS
    monkeypatch.setattr(drawn, "read", read)
    monkeypatch.setattr(drawn, "models", lambda job: drawn.Models(dalle, small_clip(0), small_clip(1)))
    configs, said = of_run("drawn")
    found = set()
    for config in configs:
        for settings in config.arms.values():
            candidates = settings_of(DrawnConfig, [*config.base, *settings]).num_candidates
            result = drawn.run(job("drawn", [*config.base, *settings, "num_prompts=3"]))
            found |= set(result.numbers)
            assert all(math.isfinite(value) for value in result.numbers.values())
            assert max(result.curves["clip_score"].x) == candidates
            best = settings_of(DrawnConfig, settings).best_of
            assert result.numbers["clip_score"] == result.numbers[f"clip_score_best_of_{best}"]
    assert said <= found


def small_clip(seed):
    torch.manual_seed(seed)
    config = CLIPConfig(
        dim_text=16, dim_image=16, dim_latent=8, text_vocab_size=WORDS.vocab_size, text_len=8, text_enc_depth=1,
        text_heads=2, visual_enc_depth=1, visual_heads=2, image_size=16, patch_size=4,
    )  # fmt: skip
    clip = CLIP(config).eval()
    clip.text_tokenizer = WORDS
    return clip
