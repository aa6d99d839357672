"""The evaluate command: every kind of checkpoint, equal files for equal commands, comparisons, errors."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import dalle_pytorch
from dalle_pytorch import save
from dalle_pytorch.commands.evaluate import run
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.npm import SETS
from dalle_pytorch.data.shards import ShardDataset, ShardWriter
from dalle_pytorch.evaluation.report import read
from dalle_pytorch.evaluation.samples import chosen, read_samples
from dalle_pytorch.images import to_pil
from dalle_pytorch.models.inception import Inception
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.models.mobilenet import MobileNetV2
from dalle_pytorch.models.probe import Probe, ProbeConfig
from dalle_pytorch.text import BPETokenizer

WORDS = ("red apple", "blue car", "green tree", "cat", "dog", "house", "boat", "sun", "moon", "star", "cup", "hat")


def test_a_probe_beside_and_by_itself(place, call, tiny_clip):
    """Shards that know styles and concepts: numbers of a DALLE, an image tokenizer, a CLIP and the probe."""
    with ShardWriter(place / "known", name="known", image_size=16) as writer:
        for split in ("train", "val"):
            for i in range(12):
                concept, style = WORDS[i % 6], ("noto", "fluent")[i // 6]
                meta = {"captions": [concept, f"{concept}, {SETS[style].phrase}"], "concept": concept, "style": style}
                writer.write(split, f"{split}{i}", png(i), "png", meta)
    classes = {"style": ["fluent", "noto"], "concept": list(WORDS[:5])}
    save(Probe(ProbeConfig(image_size=16, width=8, stages=2, classes=classes)), place / "probe.safetensors")
    more = [f"data.path={place}/known", f"probe={place}/probe.safetensors", "codecs=false"]
    for out in ("one", "two"):
        judges = [f"judge={place}/judge.safetensors", f"ranker={place}/ranker.safetensors"]
        code, error = call(*common(place, "dalle", out), *more, *judges, "num_prompts=12", "caption=1")
        assert code == 0, error
    assert (place / "one/metrics.json").read_bytes() == (place / "two/metrics.json").read_bytes()
    metrics = read(place / "one/metrics.json").metrics
    for name, count in (("style", 12), ("concept", 10), ("all", 10)):
        assert metrics[f"follows_{name}"].count == metrics[f"follows_{name}_best_of_4"].count == count
        assert metrics[f"follows_{name}_real"].count == metrics[f"follows_{name}_shuffled"].count == count
    assert metrics["follows_style"].protocol["caption"] == 1
    assert metrics["follows_style"].weights_sha256 == metrics["fid_probe"].weights_sha256
    assert "Caption following" in (place / "one/report.html").read_text()
    call(*common(place, "dalle", "plain"), *more, "num_prompts=12")
    metrics = read(place / "plain/metrics.json").metrics
    assert metrics["follows_concept"].count == 5  # one of the six is unknown, and plain captions are alike in styles
    assert "follows_style" not in metrics
    code, error = call(*common(place, "vae", "vae_out"), *more)
    assert code == 0, error
    metrics = read(place / "vae_out/metrics.json").metrics
    assert (metrics["kept_style"].count, metrics["kept_concept"].count) == (12, 10)
    assert metrics["kept_style_real"].value >= 0
    assert "rfid_probe" in metrics
    code, error = call(*common(place, "judge", "clip_out"), f"data.path={place}/known")
    assert code == 0, error
    metrics = read(place / "clip_out/metrics.json").metrics
    assert metrics["zero_shot_concept_top1"].protocol["classes"] == 6
    assert {"zero_shot_concept_top5", "zero_shot_style_top1"} <= set(metrics)
    code, error = call(*common(place, "probe", "probe_out"), f"data.path={place}/known")
    assert code == 0, error
    subject, metrics = read(place / "probe_out/metrics.json")
    assert subject.kind == "probe"
    assert set(metrics) == {"accuracy_style", "accuracy_concept"}
    # a probe says nothing about data that know no factors
    code, error = call(*common(place, "dalle", "unknown"), f"probe={place}/probe.safetensors")
    assert code == 0, error
    metrics = read(place / "unknown/metrics.json").metrics
    assert not any(name.startswith("follows") for name in metrics)


@pytest.mark.parametrize("kind", ["dalle", "judge"])
def test_phrases_are_told_apart_by_models_that_read_captions(place, call, kind):
    phrases = ",".join(WORDS)
    code, error = call(*common(place, kind, "out"), f"phrases=[{phrases}]")
    assert code == 0, error
    told = read(place / "out/metrics.json").metrics["phrases_told"]
    assert (told.count, told.protocol["phrases"]) == (12, ", ".join(WORDS))
    assert "Phrases told apart" in (place / "out/report.html").read_text()
    model = dalle_pytorch.load(place / f"{kind}.safetensors", kind={"judge": "clip"}.get(kind, kind))
    config = DataConfig(path=str(place / "data"))
    samples = read_samples(ShardDataset(place / "data", "val"), config, 16, most=0, seed=0, caption=0)
    right = []
    for caption, image in zip(samples.captions, samples.images[:, None], strict=True):
        texts = model.text_tokenizer.tokenize([f"a {word}" for word in WORDS], 12)
        if kind == "judge":
            fits = model.scores(texts, image)[:, 0]
        else:
            tokens = model.vae.encode(image)
            fits = torch.stack([-model.loss(text[None], tokens).image for text in texts])
        right.append(f"a {WORDS[fits.argmax()]}" == caption)
    assert told.value == pytest.approx(sum(right) / 12)
    code, error = call(*common(place, "vae", "other"), f"phrases=[{phrases}]")
    assert code == 1
    assert error.startswith("error: phrases= is for dalle and clip checkpoints, and this is a vae")


def test_unreadable_pictures_do_not_shift_what_the_others_show(place):
    """The next readable picture takes the place of a broken one, and brings its own caption along."""
    with ShardWriter(place / "broken", name="broken", image_size=16) as writer:
        for i in range(4):
            writer.write("val", str(i), b"no picture" if i == 1 else png(i), "png", {"captions": [f"caption {i}"]})
    data = DataConfig(path=str(place / "broken"), max_bad_fraction=0.5)
    samples = read_samples(ShardDataset(place / "broken", "val"), data, 16)
    assert samples.captions == ["caption 0", "caption 2", "caption 2", "caption 3"]
    assert torch.equal(samples.images[1], samples.images[2])


def png(seed: int) -> bytes:
    """A small picture of its own."""
    buffer = io.BytesIO()
    to_pil(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed))).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def place(tmp_path, make_dalle, tiny_clip):
    """A folder with shards, a VAE, a DALLE and two CLIPs."""
    with ShardWriter(tmp_path / "data", name="tiny", image_size=16) as writer:
        for split, count in (("train", 14), ("val", 12), ("other", 12), ("many", 70), ("single", 1)):
            for i in range(count):
                caption = f"a {WORDS[i % len(WORDS)]}"
                writer.write(split, f"{split}{i}", png(i + 100 * len(split)), "png", {"captions": [caption]})
    tokenizer = BPETokenizer.train([f"a {word}" for word in WORDS], 300)
    dalle = make_dalle(text_vocab_size=tokenizer.vocab_size, text_len=12)
    dalle.text_tokenizer = tokenizer
    save(dalle, tmp_path / "dalle.safetensors", training={"step": 7})
    save(dalle.vae, tmp_path / "vae.safetensors")
    config = {**vars(tiny_clip.config), "text_vocab_size": tokenizer.vocab_size, "text_len": 12}
    for name in ("judge", "ranker"):
        clip = type(tiny_clip)(type(tiny_clip.config)(**config))
        clip.text_tokenizer = tokenizer
        save(clip, tmp_path / f"{name}.safetensors")
    return tmp_path


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Run the command; its exit code and error output."""

    def start(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        code: object = 0
        try:
            run()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return start


def common(place, checkpoint: str, out: str) -> list[str]:
    return [
        f"checkpoint={place}/{checkpoint}.safetensors",
        f"data.path={place}/data",
        "rounds=20",
        "halves=0",
        "num_prompts=3",
        "num_candidates=4",
        f"out={place}/{out}",
    ]


def under_torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in two processes."""
    script = Path(dalle_pytorch.__file__).parents[1] / "evaluate.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)


def test_an_image_tokenizer_twice_is_equal_byte_for_byte(place, call):
    for out in ("one", "two"):
        assert call(*common(place, "vae", out), f"judge={place}/judge.safetensors") == (0, "")
    for name in ("metrics.json", "report.html"):
        assert (place / "one" / name).read_bytes() == (place / "two" / name).read_bytes()
    subject, metrics = read(place / "one" / "metrics.json")
    assert (subject.kind, subject.step) == ("vae", None)
    assert {"psnr", "codebook_perplexity", "rfid_clip", "webp_bytes"} <= set(metrics)
    assert metrics["psnr"].count == 12
    assert metrics["psnr"].protocol["split"] == "val"
    assert str(place) not in (place / "one" / "metrics.json").read_text()


def test_a_dalle_with_ranker_and_judge(place, call):
    judges = [f"judge={place}/judge.safetensors", f"ranker={place}/ranker.safetensors"]
    for out in ("one", "two"):
        code, error = call(*common(place, "dalle", out), *judges, "max_samples=10")
        assert code == 0, error
    assert (place / "one" / "metrics.json").read_bytes() == (place / "two" / "metrics.json").read_bytes()
    subject, metrics = read(place / "one" / "metrics.json")
    assert (subject.kind, subject.step) == ("dalle", 7)
    names = {"image_nats", "text_nats", "gain_of_caption", "clip_score_best_of_4", "r_precision", "fid_clip", "cmmd"}
    assert names <= set(metrics)
    assert metrics["image_nats"].protocol["pictures"] == "10 of 12, drawn by seed 0"
    assert metrics["clip_score"].count == 3
    unigram = metrics["image_nats_unigram"].protocol
    assert (unigram["unigram_split"], unigram["unigram_samples"]) == ("train", 14)
    assert unigram["unigram_sha256"] != unigram["data_sha256"]
    html = (place / "one" / "report.html").read_text()
    assert "CLIP score against N" in html
    assert "data:image/png;base64" in html
    code, error = call(*common(place, "dalle", "three"), "num_prompts=0")
    assert code == 0, error
    assert "clip_score" not in read(place / "three" / "metrics.json").metrics


def test_a_scorer_of_a_user_ranks_for_the_judge(place, call, monkeypatch):
    source = "class Warm:\n    def score(self, images, prompt):\n        return images[:, 0].mean(dim=(1, 2))\n"
    (place / "scorers_to_evaluate.py").write_text(source + "class Mute:\n    pass\n", encoding="utf-8")
    monkeypatch.syspath_prepend(place)
    judge = f"judge={place}/judge.safetensors"
    code, error = call(*common(place, "dalle", "out"), judge, "ranker=scorers_to_evaluate.Warm", "max_samples=10")
    assert code == 0, error
    protocol = read(place / "out" / "metrics.json").metrics["clip_score_best_of_4"].protocol
    assert protocol["ranker"] == "scorers_to_evaluate.Warm"
    code, error = call(*common(place, "dalle", "two"), judge, "ranker=scorers_to_evaluate.Mute")
    assert code == 1
    assert "Mute cannot rank" in error


@pytest.mark.usefixtures("unchecked_shapes")
def test_sweep_completion_and_memorisation_of_a_dalle(place, call):
    given = [
        f"judge={place}/judge.safetensors",
        "sweep.temperature=[0.5,1]",
        "sweep.top_k=[0,3]",
        "complete.rows=[0.25,0.5]",
        "complete.hole=[0.5]",
        "complete.num_pictures=4",
        "memorisation=true",
    ]
    code, error = call(*common(place, "dalle", "one"), *given)
    assert code == 0, error
    done = under_torchrun(*common(place, "dalle", "two"), *given)
    assert done.returncode == 0, done.stderr
    assert (place / "one" / "metrics.json").read_bytes() == (place / "two" / "metrics.json").read_bytes()
    metrics = read(place / "one" / "metrics.json").metrics
    # the same prompts and seeds: the setting that is the model's own draws what was drawn without a sweep
    for name in ("clip_score", "r_precision", "fid_clip", "cmmd"):
        assert metrics[f"{name}_at_temperature_1_top_k_0"] == metrics[name]
    swept = [name for name in metrics if name.startswith("clip_score_at_")]
    assert len(swept) == len({metrics[name].value for name in swept}) == 4
    assert metrics["clip_score_at_temperature_0.5_top_k_3"].protocol["sampling.top_k"] == "3"
    for part in ("rows_0.25", "rows_0.5", "hole_0.5"):
        assert metrics[f"complete_{part}_l1"].count == 4
        assert metrics[f"complete_{part}_l1"].protocol["candidates"] == 2
        assert metrics[f"complete_{part}_clip_score_real"].protocol["part"] == part
    assert metrics["nearest_train_pixel"].protocol["train_pictures"] == 14
    assert metrics["nearest_train_pixel_real"].protocol["train_split"] == "train"
    assert metrics["nearest_train_decoded_clip_reconstructed"].count == 12
    html = (place / "one" / "report.html").read_text()
    for title in (
        "Sampling: CMMD against CLIP score",
        "Completion, hole_0.5",
        "Nearest training pictures: features of clip",
    ):
        assert title in html


def test_completion_needs_no_drawn_pictures_and_no_judge(place, call):
    code, error = call(*common(place, "dalle", "out")[:-3], "num_prompts=0", "complete.rows=[0.5]", f"out={place}/out")
    assert code == 0, error
    metrics = read(place / "out" / "metrics.json").metrics
    assert {"complete_rows_0.5_psnr", "complete_rows_0.5_l1_gain_of_caption"} <= set(metrics)
    assert not [name for name in metrics if "clip" in name]


def test_a_clip(place, call):
    code, error = call(*common(place, "judge", "out"), "threads=2")
    assert code == 0, error
    assert torch.get_num_threads() == 2
    metrics = read(place / "out" / "metrics.json").metrics
    assert metrics["text_to_image_r10"].protocol["candidates"] == 12


def test_comparisons_of_two_splits_are_refused(place, call):
    call(*common(place, "vae", "one"), "codecs=false")
    call(*common(place, "vae", "two"), "codecs=false", "split=other")
    files = [str(place / name / "metrics.json") for name in ("one", "two")]
    assert call("compare", files[0], files[0])[0] == 0
    code, error = call("compare", *files)
    assert code == 1
    assert "protocol.split is 'val' in" in error
    assert error.count("\n") == 1
    # the same split of the same pictures from another folder is the same protocol
    (place / "data").rename(place / "moved")
    call(
        *common(place, "vae", "three")[:1],
        f"data.path={place}/moved",
        "rounds=20",
        "codecs=false",
        f"out={place}/three",
    )
    content = json.loads((place / "three" / "metrics.json").read_text())
    assert content == json.loads((place / "one" / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["split=nothing"], "no split 'nothing'"),
        (["ranker=x"], "give judge= too"),
        (["judge={}/vae.safetensors"], "a clip is needed"),
        (["probe={}/vae.safetensors"], "a probe is needed"),
        (["caption=-1"], "caption"),
        (["judge={0}/judge.safetensors", "ranker={0}/judge.safetensors"], "give two CLIPs"),
        (["inception={}/nothing.pth"], "no file or folder"),
        (["rounds=1"], "rounds"),
        (["num_candidates=0"], "num_candidates"),
        (["threads=0"], "threads"),
        (["data.path=pipe:cat x.tar"], "stream"),
        (["max_samples=1"], "max_samples must be at least 2"),
        (["num_prompts=1"], "num_prompts must be at least 2"),
        (["blurs=[nan]"], "blurs must be a finite number"),
        (["split=single"], "has 1 of the two images that are needed at least: give split=train+val"),
        (["checkpoint={}/nothing.safetensors"], "no file or folder"),
        (["judge={}/judge.safetensors", "sweep.temperature=[]"], "sweep.temperature is an empty list"),
        (["judge={}/judge.safetensors", "sweep.cond_scale=[1]"], "sweep.cond_scale"),
        (["judge={}/judge.safetensors", "sweep.top_k=[a]"], "sweep.top_k"),
        (["judge={}/judge.safetensors", "sweep.top_p=[2]"], "sweep with top_p=2"),
        (["judge={}/judge.safetensors", "sweep.top_k=[1]", "num_prompts=0"], "num_prompts=0"),
        (["sweep.top_k=[1]"], "sweep needs judge="),
        (["complete.rows=[0.01]"], "complete.rows=0.01 gives 0 of 4"),
        (["memorisation=true", "split=train+val"], "'train' is data.train_split too"),
        (["phrases=[noto]"], "phrases must be two or more"),
        (["phrases=[noto,twemoji]"], "0 of 12 captions hold one of phrases"),
    ],
)
def test_what_cannot_be_judged_ends_with_one_line(place, call, arguments, said):
    code, error = call(*common(place, "dalle", "out"), *(argument.format(place) for argument in arguments))
    assert code in (1, 2)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("kind", "setting"), [("vae", "ranker"), ("judge", "judge"), ("judge", "inception"), ("judge", "vgg")]
)
def test_files_that_nobody_reads_are_refused(place, call, kind, setting):
    more = [f"{setting}={place}/ranker.safetensors"] + [f"judge={place}/judge.safetensors"] * (setting == "ranker")
    code, error = call(*common(place, kind, "out"), *more)
    assert code == 1
    assert error.startswith(f"error: {setting}= is for ")
    assert error.endswith("leave it out\n")


@pytest.mark.parametrize("setting", ["sweep.top_k=[1]", "complete.hole=[0.5]", "memorisation=true"])
def test_an_image_tokenizer_draws_nothing(place, call, setting):
    code, error = call(*common(place, "vae", "out"), setting, f"judge={place}/judge.safetensors")
    assert code == 1
    assert error.startswith("error: sweep, complete and memorisation are for dalle checkpoints, and this is a vae")


def test_the_choice_of_pictures_is_the_seeds():
    assert chosen(5, 0, 1) == chosen(5, 9, 1) == [0, 1, 2, 3, 4]
    assert chosen(100, 7, 1) == chosen(100, 7, 1) == sorted(set(chosen(100, 7, 1)))
    assert len(chosen(100, 7, 1)) == 7
    assert chosen(100, 7, 2) != chosen(100, 7, 1)


def test_the_page_holds_pictures_that_open(place, call):

    call(*common(place, "vae", "out"), "codecs=false")
    found = re.findall(r"base64,([^\"]+)", (place / "out" / "report.html").read_text())
    assert len(found) == 4 * 6  # best and worst, six of each with its original
    for data in found:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert picture.size == (16, 16)  # their own pixels: the browser enlarges them
    galleries = sorted((place / "out" / "pictures").iterdir())
    assert [path.name for path in galleries] == ["best_reconstructions.png", "worst_reconstructions.png"]
    for path in galleries:
        with Image.open(path) as picture:
            assert picture.width > 6 * 128  # six columns
            assert json.loads(picture.text["dalle_pytorch"])["split"] == "val"


def test_standard_weight_files_bring_the_plain_names(place, call):
    """Random weights in the standard layouts: FID and its kin through Inception, LPIPS through VGG."""
    torch.save(Inception().state_dict(), place / "inception.pth")
    state = {name: tensor for name, tensor in LPIPS().state_dict().items() if name.startswith("features.")}
    torch.save(state, place / "vgg16.pth")
    code, error = call(*common(place, "vae", "vae_out"), f"vgg={place}/vgg16.pth", "codecs=false", "max_samples=4")
    assert code == 0, error
    metrics = read(place / "vae_out" / "metrics.json").metrics
    assert metrics["lpips_vgg"].extractor == "vgg16 with lpips heads 0.1 (own size)"
    torch.save(MobileNetV2().state_dict(), place / "mobilenet.pth")
    distances = [f"encoder={place}/mobilenet.pth", "codecs=false", "max_samples=4"]
    code, error = call(*common(place, "vae", "encoder_out"), *distances)
    assert code == 0, error
    metrics = read(place / "encoder_out" / "metrics.json").metrics
    assert {"rfid_mobilenet", "rkid_mobilenet"} <= set(metrics)
    assert "bilinear to 224" in metrics["rfid_mobilenet"].extractor
    code, error = call(*common(place, "vae", "exchanged"), f"alexnet={place}/vgg16.pth")
    assert code == 1
    assert "exchange vgg= and alexnet=" in error
    given = [f"inception={place}/inception.pth", "num_prompts=2", "num_candidates=2", "max_samples=4", "blurs=[0,1]"]
    code, error = call(*common(place, "dalle", "dalle_out"), *given)
    assert code == 0, error
    metrics = read(place / "dalle_out" / "metrics.json").metrics
    assert {"fid", "kid", "precision", "recall", "inception_score", "fid_blur_1"} <= set(metrics)
    assert "cmmd" not in metrics
    assert metrics["fid"].extractor.startswith("inception (pytorch-fid")
    assert metrics["inception_score"].value >= 1


@pytest.mark.parametrize("kind", ["vae", "dalle", "judge"])
def test_two_processes_write_the_bytes_of_one(place, call, kind):
    """70 pictures are three parts for most networks, so that both processes have some."""
    given = {"vae": ["judge"], "dalle": ["judge", "ranker"], "judge": []}[kind]
    more = [f"{name}={place}/{name}.safetensors" for name in given]
    more.append("split=many")
    code, error = call(*common(place, kind, "one"), *more)
    assert code == 0, error
    done = under_torchrun(*common(place, kind, "two"), *more)
    assert done.returncode == 0, done.stderr
    assert (place / "two" / "metrics.json").read_bytes() == (place / "one" / "metrics.json").read_bytes()
    assert (place / "two" / "report.html").read_bytes() == (place / "one" / "report.html").read_bytes()
    assert done.stdout.count("report.html") == 1
    one, two = (
        {path.name: path.read_bytes() for path in (place / name / "pictures").iterdir()} for name in ("one", "two")
    )
    assert one == two
    assert one
    assert sorted(path.name for path in (place / "two").iterdir()) == ["metrics.json", "pictures", "report.html"]


def test_an_error_of_one_process_ends_both(place):
    (place / "out").mkdir()
    (place / "out" / "notes.txt").touch()
    done = under_torchrun(*common(place, "vae", "out"))  # only the first makes the folder
    assert done.returncode != 0
    assert done.stderr.count("holds files; nothing is overwritten") == 1
    assert [path.name for path in (place / "out").iterdir()] == ["notes.txt"]
