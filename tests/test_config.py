import dataclasses
import os
import re
import shlex
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dalle_pytorch.checkpoints.export import ExportConfig
from dalle_pytorch.commands import (
    baselines,
    evaluate,
    exact_match,
    export,
    gallery,
    generate,
    prepare_data,
    train_clip,
    train_dalle,
    train_probe,
    train_vae,
)
from dalle_pytorch.compat.flags import GENERATE, TRAIN_DALLE, TRAIN_VAE
from dalle_pytorch.config import CONFIGS, argument, build, typed
from dalle_pytorch.errors import ConfigError
from dalle_pytorch.evaluation.baselines import BaselinesConfig
from dalle_pytorch.evaluation.config import EvaluateConfig
from dalle_pytorch.evaluation.exact_match import ExactMatchConfig
from dalle_pytorch.evaluation.gallery import GalleryConfig
from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.training.clip import TrainCLIPConfig
from dalle_pytorch.training.dalle import TrainDALLEConfig
from dalle_pytorch.training.probe import TrainProbeConfig
from dalle_pytorch.training.vae import TrainVAEConfig
from replication import __main__ as replicate
from replication.experiment import ReplicateConfig

ROOT = CONFIGS
COMMANDS = {
    "train_vae": (train_vae.main, TrainVAEConfig),
    "train_dalle": (train_dalle.main, TrainDALLEConfig),
    "train_clip": (train_clip.main, TrainCLIPConfig),
    "train_probe": (train_probe.main, TrainProbeConfig),
    "generate": (generate.main, GenerateConfig),
    "prepare_data": (prepare_data.main, prepare_data.PrepareDataConfig),
    "baselines": (baselines.main, BaselinesConfig),
    "exact_match": (exact_match.main, ExactMatchConfig),
    "gallery": (gallery.main, GalleryConfig),
    "evaluate": (evaluate.main, EvaluateConfig),
    "export": (export.main, ExportConfig),
    "replicate": (replicate.main, ReplicateConfig),
}
NEEDED = {
    "train_dalle": ["vae=x"],
    "generate": ["prompt=x"],
    "export": ["weights=x", "out=x"],
    "prepare_data": ["source=emoji", "out=x"],
    "baselines": ["dalle=x", "clip=x", "ranking=x"],
    "exact_match": ["dalle=x"],
    "gallery": ["out=x"],
    "evaluate": ["checkpoint=x"],
    "replicate": ["experiment=kl_weight"],
}
SHARED = ("data", "optim", "trainer", "callbacks", "logger")
TRAININGS = ("train_vae", "train_dalle", "train_clip")


def options(group):
    return sorted(f.name.removesuffix(".yaml") for f in ROOT.joinpath(group).iterdir() if f.name.endswith(".yaml"))


CASES = [(name, f"{group}={option}") for name in TRAININGS for group in SHARED for option in options(group)]
CASES += [(name, f"model={option}") for name in TRAININGS for option in options(f"{name}/model")]
CASES += [
    (name, f"experiment={option}")
    for name in (*TRAININGS, "generate", "replicate")
    for option in options(f"{name}/experiment")
]
CASES += [(name, None) for name in COMMANDS]


@pytest.mark.parametrize(("name", "choice"), CASES)
def test_every_option_of_every_group_composes(name, choice):
    overrides = [*NEEDED.get(name, []), *([choice] if choice else [])]
    if name == "replicate" and choice:
        overrides = [choice]
    if choice in ("data=folder", "experiment=vqgan_f16", "experiment=vqgan_f8"):
        overrides.append("data.path=x")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = typed(compose(name, overrides=overrides), COMMANDS[name][1])
        hydra = compose(name, overrides=overrides, return_hydra_config=True).hydra
    assert dataclasses.is_dataclass(config)
    assert hydra.output_subdir is None  # Hydra writes nothing


def test_the_same_experiments_exist_for_every_stage():
    """But for what is of one stage alone (the paper's DALLEs, second parts, VQGANs, a release under way), and the arms
    of replications."""
    shared = sorted([*options("generate/experiment"), "replicate"])
    experiments = {name: options(f"{name}/experiment") for name in TRAININGS}
    own = re.compile("paper_|.*_contrast|vqgan_|emoji_two")
    experiments = {stage: [name for name in names if not own.match(name)] for stage, names in experiments.items()}
    assert experiments == dict.fromkeys(TRAININGS, shared)


def call(monkeypatch, capsys, name, *arguments):
    """Exit code and error output of a command."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as stop:
        COMMANDS[name][0]()
    assert "HYDRA_FULL_ERROR" not in os.environ
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("model.image_sise=3", "model.image_size"),
        ("modl=tiny", "model"),
        ("model=tny", "tiny"),
        ("data=emojis", "emoji"),
        ("experiment=emojidemo", "emoji_demo"),
        ("trainer.max_stepz=3", "trainer.max_steps"),
        ("+callbacks.ema=3", "callbacks.ema_decay"),
        ("lr=3", "optim.lr"),
        ("seed=abc", "seed"),
        ("gumbel_tau.shape=cosin", "half_cosine"),
        ("model.image_size=63", "63"),
    ],
)
def test_wrong_settings_end_with_one_line_that_names_the_mend(monkeypatch, capsys, tmp_path, argument, named):
    out = tmp_path / "run"
    arguments = ["model=tiny", f"data.path={tmp_path}", f"out={out}", argument]
    code, error = call(monkeypatch, capsys, "train_vae", *arguments)
    assert code == 2
    assert argument.lstrip("+").partition("=")[0].split(".")[-1] in error
    assert named in error
    assert "Traceback" not in error
    assert not out.exists()


def test_missing_and_unquoted_values_end_with_one_line_that_names_the_mend(monkeypatch, capsys):
    code, error = call(monkeypatch, capsys, "evaluate")
    assert (code, error) == (2, "error: checkpoint= is missing: this command cannot do without it\n")
    for value in ("a cat, sitting", "a cat's face", "a=b", "cat (grinning)", 'say "cat', "(\\", "~/a b", "[", "${x} {"):
        code, error = call(monkeypatch, capsys, "generate", "weights=x", f"prompt={value}")
        assert code == 2
        assert error.startswith(f"error: prompt={value} ")
        assert argument("prompt", value) in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "value",
    ["cat", "a cat", "cat's", "2+2=4", 'say "cat"', "C:\\new\\", 'a\\"b', '\\\\"', "~/x", "", "a\nb", "$x (y) [z], {"],
)
def test_what_an_error_proposes_to_type_reaches_the_setting(value):
    """Through the shell, and through Hydra."""
    (typed_argument,) = shlex.split(argument("prompt", value))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert compose("generate", overrides=[typed_argument]).prompt == value


def test_what_stands_for_nothing_names_the_setting_and_the_escape(monkeypatch, capsys):
    code, error = call(monkeypatch, capsys, "generate", 'prompt="${nope} cats"')
    assert code == 2
    assert error.startswith("error: prompt: ")
    assert "\\${" in error


def settings_of(flag):
    """Names of settings that the answer to a flag has, without those that are added with a plus."""
    words = " ".join((*(item.partition("=")[0] + "=" for item in flag.settings), flag.remark))
    words = re.sub(
        r"prepare_data\.py( \S+=\S+)+|prepare_data.py takes \S+=|\+\S+=|dalle-import-weights.*|source=\S+", "", words
    )
    return re.findall(r"([a-z_.]+)=", words)


@pytest.mark.parametrize(
    ("name", "table"), [("generate", GENERATE), ("train_vae", TRAIN_VAE), ("train_dalle", TRAIN_DALLE)]
)
def test_every_flag_of_dalle_pytorch_is_answered_with_settings_that_exist(monkeypatch, capsys, name, table):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = compose(name, overrides=["logger=wandb"] if name != "generate" else [])
    groups = {"logger", "data", "trainer"}
    for flag, answer in table.items():
        assert answer.settings or answer.remark
        for setting in settings_of(answer):
            assert setting in groups or OmegaConf.select(node, setting, default=...) is not ..., (flag, setting)
        for given in ([f"--{flag}", "7"], [f"--{flag}=7"], [f"--{flag}"]):
            code, error = call(monkeypatch, capsys, name, *given)
            assert code == 2
            assert f"--{flag}" in error
            assert error.count("\n") == 1


def test_a_command_line_of_dalle_pytorch_is_answered_with_one_of_ours(monkeypatch, capsys):
    given = ["--dalle_path", "a b/dalle.pt", "--text=a cat, sitting", "--num_images", "4", "--top_k", "0.9", "--taming"]
    code, error = call(monkeypatch, capsys, "generate", *given)
    assert code == 2
    command, _, remarks = error.partition("; ")
    assert shlex.split(command.partition(" give ")[2]) == [
        'weights="a b/dalle.pt"', 'prompt="a cat, sitting"', "num_candidates=4", "num_keep=4"
    ]  # fmt: skip
    assert "sampling.top_k=819 for 8192 codes" in remarks
    assert "--taming: leave it out" in remarks
    for setting, answer in (
        ("dalle_path=x", "weights="),
        ("num_images=2", "num_candidates= and num_keep="),
        ("sampling.top_k=0.9", "sampling.top_k=819 for 8192 codes"),
        ("sampling.filter_thres=0.9", "sampling.top_k=819 for 8192 codes"),
    ):
        code, error = call(monkeypatch, capsys, "generate", "prompt=cat", setting)
        assert code == 2
        assert setting.partition("=")[0] in error
        assert answer in error


@pytest.mark.parametrize(("given", "named"), [("--foo", "--foo"), ("-x=3", "-x"), ("a red apple", "a red apple")])
def test_what_is_no_setting_is_named(monkeypatch, capsys, given, named):
    code, error = call(monkeypatch, capsys, "generate", "prompt=cat", given)
    assert code == 2
    assert named in error
    assert "name=value" in error
    assert error.count("\n") == 1


def test_a_mistake_found_later_ends_with_code_1(monkeypatch, capsys, tmp_path):
    code, error = call(monkeypatch, capsys, "train_vae", f"data.path={tmp_path / 'nowhere'}")
    assert code == 1
    assert "nowhere" in error
    assert "prepare_data" in error
    code, error = call(monkeypatch, capsys, "train_dalle", "vae=nothing.safetensors")
    assert code == 1
    assert error.startswith("error: no file or folder nothing.safetensors")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("export", ["weights=none.pt", "out=x"]),
        ("generate", ["weights=none.pt", "prompt=cat"]),
        ("train_vae", ["data.path=nowhere"]),
        ("train_vae", ["data.path=nowhere", "out=."]),
    ],
)
def test_an_error_does_not_remove_the_empty_folder_that_it_happens_in(monkeypatch, capsys, tmp_path, name, settings):
    """But the folder of the run, which was made for it."""
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, capsys, name, *settings)[0] == 1
    assert tmp_path.is_dir()
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_full_traceback_can_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["train_vae.py", f"data.path={tmp_path / 'nowhere'}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train_vae.main()


def test_a_command_runs_from_any_folder_and_leaves_nothing_there(tmp_path):
    command = [sys.executable, "-m", "dalle_pytorch.commands.train_vae", "--cfg", "job"]
    environment = os.environ | {"PYTHONPATH": str(ROOT.parent)}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "codebook_size: 1024" in shown.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["--cfg", "job", "seed=7", "batch_size=3"], ["seed=7", "batch_size=3", "--cfg=job"]]
)
def test_flags_may_stand_before_or_after_the_settings(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    generate.main()
    assert "seed: 7" in capsys.readouterr().out


def test_surplus_arguments_of_third_parties_are_named():
    with pytest.raises(ConfigError, match=r"trainer\.max_stepz.*max_steps"):
        build({"_target_": "pytorch_lightning.Trainer", "max_stepz": 1}, "trainer")
    with pytest.raises(ConfigError, match="_target_"):
        build({"max_steps": 1}, "trainer")
