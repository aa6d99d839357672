"""The generate command: files, metadata, repeatability, errors."""

import codecs
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle_pytorch import DALLE, DALLEConfig, Generator, files, load, save
from dalle_pytorch.commands import generate as generate_command
from dalle_pytorch.commands.generate import main
from dalle_pytorch.generation import generator as generator_module
from dalle_pytorch.generation import results as results_module
from dalle_pytorch.generation.config import GenerateConfig
from dalle_pytorch.generation.draw import to_complete
from dalle_pytorch.generation.generator import Candidates, ranked
from dalle_pytorch.generation.grid import save_animation
from dalle_pytorch.generation.results import PreviewAnimation, Results, file_stem
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.images import to_pil
from dalle_pytorch.models.vq_vae import VQVAE, VQVAEConfig
from dalle_pytorch.text import BPETokenizer

PROMPTS = ["a red apple", "a blue car"]
FLOATS = [f"sampling.{item.name}" for item in fields(SamplingConfig) if item.type is float]


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
        f"weights={models}/dalle.safetensors",
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
        f"weights={models}/dalle.safetensors",
        f"prompts_file={models}/prompts.txt",
        "num_candidates=2",
        "num_keep=2",
        f"out={models}/out",
    )
    report = json.loads((models / "out" / "ranking.json").read_text())
    assert [row["prompt"] for row in report["prompts"]] == PROMPTS
    assert report["prompts"][0]["all_scores"] is None


def test_an_index_of_the_ranking_is_drawn_again(models, monkeypatch):
    run(monkeypatch, *arguments(models, "all"))
    run(monkeypatch, *arguments(models, "some"), "indices=[3,1]", "batch_size=1")
    every, some = (json.loads((models / name / "ranking.json").read_text())["prompts"] for name in ("all", "some"))
    for before, after in zip(every, some, strict=True):
        assert after["indices"] == [3, 1]
        assert after["all_scores"] == pytest.approx([before["all_scores"][3], before["all_scores"][1]], abs=2e-4)
        tokens = {row["index"]: row["image_tokens"] for row in after["kept"]}
        assert all(tokens.get(row["index"], row["image_tokens"]) == row["image_tokens"] for row in before["kept"])


def test_scorers_vote(models, monkeypatch):
    clip = load(models / "clip.safetensors")
    torch.nn.init.normal_(clip.to_text_latent.weight)
    save(clip, models / "other.safetensors")
    both = f"'clip={models}/clip.safetensors|{models}/other.safetensors'".strip("'")
    run(monkeypatch, *arguments(models, "out"), both, "num_keep=5")
    for row in json.loads((models / "out" / "ranking.json").read_text())["prompts"]:
        assert sum(kept["score"] for kept in row["kept"]) == pytest.approx(0, abs=1e-3)  # standard deviations
        assert all(len(kept["scores"]) == 2 for kept in row["kept"])
        scores = [kept["score"] for kept in row["kept"]]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_scorer_of_a_user_votes(models, monkeypatch, capsys):
    source = "class Warm:\n    def score(self, images, prompt):\n        return images[:, 0].mean(dim=(1, 2))\n"
    (models / "scorers_to_generate.py").write_text(source + "class Mute:\n    pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(models)
    run(monkeypatch, *arguments(models, "one"), "clip=scorers_to_generate.Warm", "num_keep=5")
    run(monkeypatch, *arguments(models, "two"), f"clip='{models}/clip.safetensors|scorers_to_generate.Warm'")
    dalle = load(models / "dalle.safetensors")
    rows, votes = (json.loads((models / out / "ranking.json").read_text())["prompts"] for out in ("one", "two"))
    for row, voted in zip(rows, votes, strict=True):
        kept = row["kept"]
        images = dalle.vae.decode(torch.tensor([candidate["image_tokens"] for candidate in kept]))
        assert [candidate["score"] for candidate in kept] == pytest.approx(
            images[:, 0].mean(dim=(1, 2)).tolist(), abs=1e-4
        )
        warmth = {candidate["index"]: candidate["score"] for candidate in kept}
        for candidate in voted["kept"]:
            assert candidate["scores"][1] == pytest.approx(warmth[candidate["index"]], abs=2e-4)
    for name, said in (("Mute", "Mute cannot rank"), ("Cold", "has no class Cold")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *arguments(models, "three"), f"clip=scorers_to_generate.{name}")
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
        assert not (models / "three").exists()


@pytest.mark.parametrize("how", ["rows", "mask"])
def test_completes_a_picture(models, monkeypatch, how):
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    picture.save(models / "picture.png")
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 16, 9) if how == "rows" else (5, 4, 16, 12))  # partly covered tokens are drawn anew
    mask.save(models / "mask.png")
    extra = "keep_rows=2" if how == "rows" else f"keep_mask={models}/mask.png"
    run(monkeypatch, *arguments(models, "out"), f"image={models}/picture.png", extra)
    dalle = load(models / "dalle.safetensors")
    pixels = torch.tensor(list(picture.tobytes())) / 255
    expected = dalle.vae.encode(pixels.view(16, 16, 3).permute(2, 0, 1)[None])[0].view(4, 4)
    for row in json.loads((models / "out" / "ranking.json").read_text())["prompts"]:
        for kept in row["kept"]:
            tokens = torch.tensor(kept["image_tokens"]).view(4, 4)
            part = (slice(0, 2), slice(None)) if how == "rows" else (slice(1, 3), slice(2, 4))
            assert torch.equal(tokens[part], expected[part])


def test_an_animation_ends_with_the_best(models, monkeypatch):
    run(monkeypatch, *arguments(models, "out"), "progressive=true")
    for prompt in ("00_a-red-apple", "01_a-blue-car"):
        with Image.open(models / "out" / f"{prompt}.gif") as film:
            assert film.n_frames == 4  # after 1, 2 and 3 of 4 token rows, and the kept pictures
            film.seek(0)
            first = film.convert("RGB").getpixel((40, 18 + 6 + 100))
            film.seek(3)
            assert film.info["duration"] > 1000
            assert abs(first[0] - 217) < 6  # what is not drawn yet is light grey
            assert film.convert("RGB").getpixel((40, 18 + 6 + 100)) != first


def test_frames_of_an_animation_have_one_size(tmp_path):
    frames = [Image.new("RGB", (40, 20), "black"), Image.new("RGB", (20, 20), "red")]
    save_animation(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        film.seek(1)
        last = film.convert("RGB")
    assert last.getpixel((10, 10)) == (254, 0, 0) or last.getpixel((10, 10)) == (255, 0, 0)
    assert last.getpixel((30, 10)) == (255, 255, 255)


def test_a_mask_that_keeps_nothing_is_refused(models, monkeypatch, capsys):
    for name, shade in (("black", 0), ("white", 255)):
        Image.new("L", (16, 16), shade).save(models / f"{name}.png")
    for name, message in (("black", "keeps no token"), ("white", "keeps every token")):
        with pytest.raises(SystemExit):
            run(
                monkeypatch,
                *arguments(models, "out"),
                f"image={models}/white.png",
                f"keep_mask={models}/{name}.png",
            )
        assert message in capsys.readouterr().err
        assert not (models / "out").exists()


@pytest.mark.parametrize(("tokens", "finished"), [(20, [0, 1]), (5, None)])
def test_cancelling_keeps_what_is_finished(models, monkeypatch, capsys, tokens, finished):
    """Ctrl-C in the second micro-batch of the first prompt, and in the first."""
    original, drawn = generator_module.draw_image_tokens, []

    def interrupted(*given):
        for event in original(*given):
            if len(drawn) == tokens:
                raise KeyboardInterrupt
            drawn.append(event)
            yield event

    monkeypatch.setattr(generator_module, "draw_image_tokens", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        run(monkeypatch, *arguments(models, "out"), "batch_size=2")
    assert exit_info.value.code == 130
    assert "cancelled" in capsys.readouterr().err
    if finished is None:
        assert not (models / "out").exists()
        return
    (row,) = json.loads((models / "out" / "ranking.json").read_text())["prompts"]
    assert row["indices"] == finished
    assert len(row["kept"]) == 2


def test_two_processes_draw_what_one_draws(models, monkeypatch):
    run(monkeypatch, *arguments(models, "one"), "num_candidates=7", "num_keep=3")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(generate_command.__file__).parents[2] / "generate.py"
    two = [*arguments(models, "two"), "num_candidates=7", "num_keep=3"]
    subprocess.run([*command, str(script), *two], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    reports = [json.loads((models / name / "ranking.json").read_text())["prompts"] for name in ("one", "two")]
    for alone, together in zip(*reports, strict=True):
        assert together["indices"] == alone["indices"] == list(range(7))
        assert together["all_scores"] == pytest.approx(alone["all_scores"], abs=2e-4)
        assert [row["index"] for row in together["kept"]] == [row["index"] for row in alone["kept"]]
        assert [row["image_tokens"] for row in together["kept"]] == [row["image_tokens"] for row in alone["kept"]]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (['prompt=" | "'], "no prompt"),
        (["prompts_file=nowhere.txt", "prompt=null"], "nowhere.txt"),
        (["weights=nowhere.safetensors"], "nowhere.safetensors"),
        (["num_keep=9"], r"num_keep \(9\)"),
        (["sampling.top_p=0"], "top_p"),
        (["sampling.topk=3"], "sampling.top_k"),
        (["keep_rows=2"], "image=FILE"),
        (["image=nowhere.png"], "keep_rows=ROWS and keep_mask=FILE"),
        (["image=nowhere.png", "keep_rows=2"], "nowhere.png does not exist"),
        (["indices=[1,1]"], "indices must be different"),
        (["precision=fp64"], "fp32, bf16, fp16, int8"),
        (["memory_gb=0"], "memory_gb"),
        *(
            ([f"{name}={value}"], f"{name.rpartition('.')[2]} must be a finite number, got {value}")
            for name in (*FLOATS, "memory_gb", "min_distance")
            for value in ("nan", "inf", "-inf")
        ),
        (["sampling.cfg_scale=1", "sampling.cfg_schedule=[1,nan]"], "cfg_schedule must be a finite number"),
        (["sampling.temperature=1e-38"], "temperature=1e-38 would overflow"),
        (["sampling.cfg_scale=1e38"], r"cfg_scale=1e\+38 would overflow"),
        (["sampling.cfg_scale=1", "sampling.cfg_schedule=[1,-1e38]"], "cfg_schedule=.* would overflow"),
        (['prompt="a \udcff"'], r"prompt='a \\udcff' holds bytes that are no UTF-8"),
        (['negative_prompt="a \udcff"'], r"negative_prompt='a \\udcff' holds bytes that are no UTF-8"),
        (["min_distance=2"], "min_distance"),
        (["sampling.cfg_schedule=[1,2]"], "cfg_schedule"),
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
    assert "holds files; nothing is overwritten" in capsys.readouterr().err
    assert (models / "out" / "ranking.json").read_bytes() == before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_the_encoding_of_a_file_does_not_change_its_prompts(tmp_path, encoding):
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "prompts.txt").write_bytes(mark + "a café\r\n\n a\u2028b\n".encode(encoding))
    assert GenerateConfig(prompts_file=str(tmp_path / "prompts.txt")).prompts() == ["a café", "a\u2028b"]


def test_prompts_are_read_from_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=["a red apple\n"])
    writer.start()
    assert GenerateConfig(prompts_file=str(tmp_path / "pipe")).prompts() == ["a red apple"]
    writer.join()


@pytest.mark.parametrize("content", ["café".encode("latin-1"), "cat".encode("utf-16-le"), b"\x89PNG", b"\xff\xfea"])
def test_a_file_that_is_no_text_is_named(models, monkeypatch, capsys, content):
    (models / "prompts.txt").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, f"prompts_file={models}/prompts.txt", f"out={models}/out")
    assert stop.value.code == 1
    assert re.fullmatch(rf"error: prompts_file={models}/prompts\.txt .*save it as UTF-8\n", capsys.readouterr().err)


@pytest.mark.parametrize("wanted", ["null", "-1"])
def test_a_random_seed_is_told_and_draws_the_same_again(models, monkeypatch, capsys, wanted):
    found = []
    for name in ("a", "b"):
        run(monkeypatch, *arguments(models, name), f"seed={wanted}")
        settings = json.loads((models / name / "ranking.json").read_text())["settings"]
        assert capsys.readouterr().out.startswith(f"seed={settings['seed']}\n")
        found.append(settings["seed"])
    assert found[0] != found[1]
    run(monkeypatch, *arguments(models, "again"), f"seed={found[0]}")
    first, again = (json.loads((models / name / "ranking.json").read_text())["prompts"] for name in ("a", "again"))
    assert first == again


def test_runs_that_begin_together_have_a_folder_each(models, monkeypatch):
    monkeypatch.chdir(models)

    class Frozen(files.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(files, "datetime", Frozen)
    given = [argument for argument in arguments(models, "out") if not argument.startswith("out=")]
    for _ in range(3):
        run(monkeypatch, *given)
    found = sorted(path.parent for path in Path("runs/generate").glob("*/ranking.json"))
    assert [path.name for path in found] == [f"2026-01-02_03-04-05{suffix}" for suffix in ("", "_2", "_3")]
    assert [json.loads((path / "ranking.json").read_text())["settings"]["out"] for path in found] == list(
        map(str, found)
    )


def test_a_folder_that_another_run_has_taken_is_refused_before_drawing(models, monkeypatch, capsys):
    """Both found it empty."""
    drawn = []
    monkeypatch.setattr(generate_command, "draw", lambda *given: drawn.append(given))
    monkeypatch.setattr(files, "ensure_empty", lambda *_, **__: None)
    monkeypatch.setattr(generate_command, "ensure_empty", lambda *_, **__: None)
    (models / "out").mkdir()
    (models / "out" / "ranking.json").write_text("theirs")
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments(models, "out"))
    assert stop.value.code == 1
    assert "ranking.json" in capsys.readouterr().err
    assert (models / "out" / "ranking.json").read_text() == "theirs"
    assert not drawn


def test_a_folder_with_files_is_refused_before_weights_are_read(models, monkeypatch, capsys):
    monkeypatch.setattr(generate_command, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments(models, "."))
    assert "holds files; nothing is overwritten" in capsys.readouterr().err


def interrupted_by(monkeypatch, number):
    """A signal comes while the second prompt is drawn."""
    original = generate_command.draw

    def draw(generator, prompts, numbers, config, *given):
        if 1 in numbers:
            sample = generator.sample_each

            def stopping(*args, **kwargs):
                index = json.loads((Path(config.out) / "ranking.json").read_text())
                assert [row["prompt"] for row in index["prompts"]] == PROMPTS[:1]  # it is there before the end
                signal.raise_signal(number)
                yield from sample(*args, **kwargs)

            monkeypatch.setattr(generator, "sample_each", stopping)
        return original(generator, prompts, numbers, config, *given)

    monkeypatch.setattr(generate_command, "draw", draw)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_keep_finished_prompts(models, monkeypatch, capsys, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    interrupted_by(monkeypatch, number)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments(models, "out"), "batch_size=5")
    assert stop.value.code == 128 + number
    assert "this is what was finished until then" in capsys.readouterr().err
    assert {each: signal.getsignal(each) for each in before} == before
    (row,) = json.loads((models / "out" / "ranking.json").read_text())["prompts"]
    assert row["prompt"] == PROMPTS[0]
    names = {kept["file"] for kept in row["kept"]} | {"grid.png", "ranking.json"}
    assert {path.name for path in (models / "out").iterdir()} == names


@pytest.mark.parametrize("fails", ["01_a-blue-car_01.png", "00_a-red-apple_00.png", "grid.png"])
def test_a_full_disk_keeps_finished_prompts_and_no_half_file(models, monkeypatch, capsys, fails):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    original = Path.open

    def opened(path, *given, **named):
        file = original(path, *given, **named)
        return Full(file) if path.name == fails else file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments(models, "out"))
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: No space left on device: {models}/out/{fails}"
    if fails.startswith("00"):
        assert not (models / "out").exists()
        return
    report = json.loads((models / "out" / "ranking.json").read_text())["prompts"]
    assert [row["prompt"] for row in report] == (PROMPTS if fails == "grid.png" else PROMPTS[:1])
    for row in report:
        for kept in row["kept"]:
            with Image.open(models / "out" / kept["file"]) as image:
                image.load()
    assert not (models / "out" / fails).exists()


@pytest.mark.parametrize("count", [1, 64, 1000])
def test_ranking_json_lacks_few_prompts_at_any_time_and_none_at_the_end(models, monkeypatch, count):
    """However many there are: it is not written anew for each of thousands."""
    monkeypatch.setattr(results_module, "save_png", lambda *_: None)
    monkeypatch.setattr(results_module, "picture_grid", lambda *_: None)
    images = torch.zeros(1, 3, 1, 1)
    candidates = Candidates(torch.zeros(1, 4, dtype=torch.long), images, [0])
    result, written = ranked(candidates, torch.zeros(0, 1), 1, 0.0), []
    film = PreviewAnimation(Generator(load(models / "dalle.safetensors")), "a")
    with Results(GenerateConfig(out=str(models / "out"), num_candidates=1, num_keep=1)) as results:
        write = results._write_index
        monkeypatch.setattr(results, "_write_index", lambda: written.append(len(results.report)) or write())
        for number in range(count):
            results.add(str(number), "a", result, film)
            assert results.indexed >= len(results.report) * 63 / 64 - 1
    assert written[: min(count, 64)] == list(range(1, min(count, 64) + 1))
    assert len(json.loads((models / "out" / "ranking.json").read_text())["prompts"]) == count
    assert len(written) <= 64 + 64 * 3


def test_file_names_are_safe():
    assert file_stem(3, "/../etc/Passwd: x") == "03_etc-passwd-x"
    assert file_stem(0, "猫") == "00"


@pytest.mark.parametrize(("black", "drawn"), [(2, {0}), (3, {1}), (12, {2}), (15, {3})])
def test_a_mask_meets_the_tokens_of_a_grid_that_does_not_divide_the_picture(tmp_path, black, drawn):
    """Token rows of such a grid begin at pixels 0, 3, 8 and 13: a black line belongs to one of them."""
    config = VQVAEConfig(
        image_size=16, strides=[5], quantizer="fsq", levels=[5, 3], codebook_size=15, codebook_dim=8, hidden_dim=8
    )
    tokenizer = BPETokenizer.train(PROMPTS, 300)
    sizes = {"dim": 32, "depth": 1, "heads": 2, "head_dim": 16, "text_vocab_size": tokenizer.vocab_size, "text_len": 12}
    dalle = DALLE(DALLEConfig(**sizes), vae=VQVAE(config)).eval()
    dalle.text_tokenizer = tokenizer
    mask = torch.ones(3, 16, 16)
    mask[:, black] = 0
    to_pil(torch.rand(3, 16, 16)).save(tmp_path / "image.png")
    to_pil(mask).save(tmp_path / "mask.png")
    files = {"image": str(tmp_path / "image.png"), "keep_mask": str(tmp_path / "mask.png")}
    given = to_complete(GenerateConfig(prompt="x", out="x", **files), Generator(dalle))
    assert given is not None
    rows = given.keep.view(4, 4).all(dim=1).tolist()
    assert {row for row, kept in enumerate(rows) if not kept} == drawn
