"""What an experiment says, and what the arms of the bundled ones are made of."""

from importlib.resources import files

import pytest
from hydra import compose, initialize_config_module

from dalle_pytorch.commands import train_clip, train_dalle, train_vae
from dalle_pytorch.config import typed
from dalle_pytorch.evaluation.replicate import __main__ as replicate
from dalle_pytorch.evaluation.replicate.arms import RUNS, function, settings_of, slug
from dalle_pytorch.evaluation.replicate.drawn import DrawnConfig
from dalle_pytorch.evaluation.replicate.experiment import Claim, Number, ReplicateConfig, parse
from dalle_pytorch.evaluation.replicate.powersgd import PowerSGDConfig
from dalle_pytorch.evaluation.replicate.underflow import UnderflowConfig
from dalle_pytorch.training.clip import TrainCLIPConfig
from dalle_pytorch.training.dalle import TrainDALLEConfig
from dalle_pytorch.training.vae import TrainVAEConfig

NAMES = sorted(
    path.name.removesuffix(".yaml")
    for path in files("dalle_pytorch.configs").joinpath("replicate/experiment").iterdir()
)
COMMANDS = {"vae": (train_vae, TrainVAEConfig), "dalle": (train_dalle, TrainDALLEConfig),
            "clip": (train_clip, TrainCLIPConfig)}  # fmt: skip
OWN = {"drawn": DrawnConfig, "underflow": UnderflowConfig, "powersgd": PowerSGDConfig}
assert replicate.main
NEEDED = {"claim": "c", "source": "s", "run": "vae", "name": "n"}


def load(name):
    with initialize_config_module("dalle_pytorch.configs", version_base="1.3"):
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
            with initialize_config_module("dalle_pytorch.configs", version_base="1.3"):
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
