"""Running arms, going on after an interruption, and what is written."""

import concurrent.futures
import json
import shutil
import sys
from dataclasses import replace
from importlib import import_module

import pytest
from PIL import Image

from replication import __main__ as replicate
from replication import arms, plot, runner
from replication.arms import ArmError, Curve, Job, Result, perform, slug
from replication.experiment import ReplicateConfig

SETTINGS = ["data.batch_size=8", "model.image_size=16", "model.hidden_dim=8", "model.codebook_size=16",
            "trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.checkpoint_every=2"]  # fmt: skip


def config(out, **changes):
    given = {
        "name": "toy", "row": "R0", "claim": "More is more.", "source": "nobody", "run": "vae", "base": SETTINGS,
        "arms": {"1/2": ["model.codebook_dim=4"], "1": ["model.codebook_dim=8"]}, "seeds": [0, 1],
        "shown": ["psnr"], "expect": ["psnr[1] > psnr[1/2]"], "out": str(out), "axis": "share",
    }  # fmt: skip
    return ReplicateConfig(**{**given, **changes})


@pytest.fixture
def counted(monkeypatch):
    """In place of a run: numbers from arm and seed, and a count of what ran."""
    ran = []

    def run(job: Job) -> Result:
        ran.append((job.settings, job.seed))
        return Result({"psnr": float(job.seed + 10 * len(job.settings))}, {"loss": Curve([1, 2], [0.5, 0.25])})

    monkeypatch.setattr(arms, "function", lambda run_name, name: run if name == "run" else None)
    return ran


def job(folder, **changes):
    given = {"run": "vae", "settings": ("a=1",), "seed": 3, "folder": folder, "shared": folder, "threads": 1}
    return Job(**{**given, **changes})


def test_what_ended_is_not_run_again(tmp_path, counted):
    first = perform(job(tmp_path))
    assert perform(job(tmp_path)) == first
    assert len(counted) == 1


@pytest.mark.parametrize("change", [{"settings": ("a=2",)}, {"seed": 4}, {"run": "clip"}])
def test_results_of_other_settings_are_refused_and_kept(tmp_path, counted, change):
    perform(job(tmp_path))
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ValueError, match="choose another out=, or delete that folder"):
        perform(job(tmp_path, **change))
    assert (tmp_path / "result.json").read_bytes() == before


def test_results_of_other_recipes_are_refused(tmp_path, counted, monkeypatch):
    perform(job(tmp_path))
    monkeypatch.setattr(arms, "recipes", lambda: "another")
    with pytest.raises(ValueError, match="holds a result with recipes"):
        perform(job(tmp_path))


def test_every_arm_gets_a_folder_of_its_own(tmp_path):
    found = runner.jobs_of(config(tmp_path))
    assert len({each.folder for each in found.values()}) == 4
    assert all(each.folder.is_relative_to(tmp_path / "toy") for each in found.values())
    assert [each.seed for each in found.values()] == [0, 0, 1, 1]  # all arms of a seed, then the next seed
    assert "/" not in slug("1/16")


def test_a_failed_training_shows_the_end_of_its_log(tmp_path):
    with pytest.raises(ArmError, match=r"(?s)train_vae.* failed with 2:.*model.image_sise"):
        arms.command("train_vae", ["model.image_sise=3", f"out={tmp_path / 'x'}"], tmp_path / "x.log", 1)


def test_a_training_of_other_settings_is_refused(tmp_path, monkeypatch):
    """Also what experiments share, which no arm describes."""
    monkeypatch.setattr(arms, "command", lambda name, settings, log, threads: None)
    arms.train("clip", ["a=1"], 0, tmp_path / "clip", 1)
    arms.train("clip", ["a=1"], 0, tmp_path / "clip", 1)
    for settings, seed in ((["a=2"], 0), (["a=1"], 1)):
        with pytest.raises(ArmError, match="was trained with other settings"):
            arms.train("clip", settings, seed, tmp_path / "clip", 1)


def test_written_files_hold_numbers_verdict_and_plot(tmp_path):
    results = {
        "1/2": {seed: Result({"psnr": seed + 1.0}, {"loss": Curve([1, 2], [3, 4])}) for seed in (0, 1)},
        "1": {seed: Result({"psnr": seed + 5.0}) for seed in (0, 1)},
    }
    publish = tmp_path / "docs"
    folder = runner.write(config(tmp_path, publish=str(publish)), results)
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "psnr[1] > psnr[1/2]: by 4.000 ± 0, holds" in text
    assert "At this scale: holds." in text
    numbers = json.loads((folder / "numbers.json").read_text(encoding="utf-8"))["numbers"]
    assert numbers == {"1/2": {"0": {"psnr": 1.0}, "1": {"psnr": 2.0}}, "1": {"0": {"psnr": 5.0}, "1": {"psnr": 6.0}}}
    for name in ("table.md", "numbers.json", "plot.png"):
        assert (publish / f"toy.{name}").read_bytes() == (folder / name).read_bytes()
    with Image.open(folder / "plot.png") as picture:
        assert picture.width > picture.height  # two panels in a row


def test_arms_that_are_numbers_have_a_scale():
    assert plot.positions(["0", "1/16", "2e-3"]) == [0.0, 0.0625, 0.002]
    assert plot.positions(["1", "dense"]) is None
    assert plot.positions(["1/0"]) is None


class Here(concurrent.futures.Executor):
    """In place of processes."""

    def __init__(self, *_arguments, **_settings):
        pass

    def submit(self, function, /, *arguments):
        done = concurrent.futures.Future()
        done.set_result(function(*arguments))
        return done


def train_here(name, settings, log, threads):
    """In place of a command in a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *settings])
        import_module(f"dalle_pytorch.commands.{name}").main()


def test_arms_are_really_trained_and_an_experiment_goes_on(tmp_path, shared):
    """Two steps each; what was there stays untouched, what was lost comes back the same from processes of its own."""
    toy = config(tmp_path, seeds=[0], base=[f"data.path={shared / 'pictures'}", "data.batch_size=16", *SETTINGS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrent.futures, "ProcessPoolExecutor", Here)
        patch.setattr(arms, "command", train_here)
        first = runner.run_all(toy)
    assert first["1"][0].numbers["psnr"] > 5
    kept, lost = (tmp_path / "toy" / slug(arm) / "seed_0" for arm in ("1/2", "1"))
    written = (kept / "result.json").stat().st_mtime_ns
    shutil.rmtree(lost)
    again = runner.run_all(toy)
    assert again == first
    assert (lost / "vae.log").stat().st_size
    assert (kept / "result.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="holds a result with settings"):
        runner.run_all(replace(toy, arms={"1": ["model.codebook_dim=16"]}, expect=[]))


def test_without_a_name_the_names_are_shown(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["replicate"])
    with pytest.raises(SystemExit, match=r"there are .*kl_weight"):
        replicate.run()
