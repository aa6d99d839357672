"""The gallery command: every figure is there, of the captions and candidates that its name says."""

import sys

import pytest
import torch
from PIL import Image

from dalle_pytorch import Generator, load, save
from dalle_pytorch.commands.gallery import main
from dalle_pytorch.data.config import DataConfig
from dalle_pytorch.data.shards import ShardWriter
from dalle_pytorch.data.svg import encode_webp
from dalle_pytorch.evaluation.gallery import Artist, GalleryConfig
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.images import to_pil
from dalle_pytorch.text import BPETokenizer

WORDS = ("red", "blue", "green", "cat")


@pytest.fixture
def place(tmp_path, make_dalle, tiny_clip):
    """A folder with shards, prompts, a DALLE and a CLIP."""
    with ShardWriter(tmp_path / "data", name="few", image_size=16) as writer:
        for split in ("train", "val"):
            for word in WORDS:
                picture = encode_webp(to_pil(torch.rand(3, 16, 16)))
                writer.write(split, f"{split}-{word}", picture, "webp", {"captions": [word, f"a {word} one"]})
    tokenizer = BPETokenizer.train([f"a {word} one" for word in WORDS], 300)
    dalle = make_dalle(text_vocab_size=tokenizer.vocab_size, text_len=24, caption_dropout=0.1)
    clip = type(tiny_clip)(
        type(tiny_clip.config)(**{**vars(tiny_clip.config), "text_vocab_size": tokenizer.vocab_size})
    )
    dalle.text_tokenizer = clip.text_tokenizer = tokenizer
    save(dalle, tmp_path / "dalle.safetensors")
    save(clip, tmp_path / "clip.safetensors")
    (tmp_path / "prompts.txt").write_text("a red one\n\na blue one\na cat\n")
    return tmp_path


def artist(place, **settings) -> Artist:
    config = GalleryConfig(
        data=DataConfig(path=str(place / "data")),
        prompts_file=str(place / "prompts.txt"),
        rows=2,
        num_candidates=5,
        num_keep=2,
        sampling=SamplingConfig(cfg_scale=2.0),
        out="",
        **settings,
    )
    generator = Generator(load(place / "dalle.safetensors"), load(place / "clip.safetensors"))
    return Artist(generator, config)


def test_the_command_writes_every_figure_once(place, monkeypatch, capsys):
    settings = [
        f"weights={place}/dalle.safetensors", f"clip={place}/clip.safetensors", f"data.path={place}/data",
        f"prompts_file={place}/prompts.txt", "data.val_split=val", "num_candidates=3", "num_keep=2", "rows=1",
        "guidance=[1,2]", f"out={place}/out",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["gallery", *settings])
    main()
    names = {path.name for path in (place / "out").iterdir()}
    sheets = {"00_a-red-one.png", "01_a-blue-one.png", "02_a-cat.png"}
    assert names == sheets | {f"{name}.png" for name in ("seen", "held_out", "completion", "guidance", "ranking")}
    with Image.open(place / "out/seen.png") as picture:
        assert "cfg_scale" in picture.text["dalle_pytorch"]
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "holds files; nothing is overwritten" in capsys.readouterr().err


def test_rows_hold_what_their_titles_say(place):
    drawer = artist(place)
    drawn = drawer.draw("a red one")
    every, order, _ = drawn
    best, first = drawer.sheet("a red one", drawn)
    assert all(torch.equal(image, every.images[i]) for image, i in zip(best.images, order[:2], strict=True))
    assert all(torch.equal(image, every.images[i]) for i, image in enumerate(first.images))
    top, bottom = drawer.best_and_worst("a red one", drawn)
    assert torch.equal(bottom.images[-1], every.images[order[-1]])
    scores = [float(label.split()[-1]) for row in (top, bottom) for label in row.labels]
    assert scores == sorted(scores, reverse=True)
    unguided, guided = artist(place, guidance=[1.0, 2.0]).guided("a red one")
    assert torch.equal(guided.images[1], every.images[1])
    assert not all(torch.equal(a, b) for a, b in zip(unguided.images, guided.images, strict=True))


def test_sheets_and_the_ranking_share_what_is_drawn(place, monkeypatch):
    drawn = []
    whole = Artist.draw

    def draw(self, prompt, **settings):
        drawn.append((prompt, str(settings)))
        return whole(self, prompt, **settings)

    monkeypatch.setattr(Artist, "draw", draw)
    drawer = artist(place)
    list(drawer.figures())
    plain = [prompt for prompt, settings in drawn if settings == "{}"]
    sheets = ["a red one", "a blue one", "a cat"]
    assert plain[-3:] == sheets  # the ranking is of the first two
    assert len(plain) == len(sheets) + 2 * drawer.config.rows


def test_split_figures_show_real_pictures_with_the_asked_caption(place):
    figures = dict(artist(place).figures())
    assert set(figures) >= {"seen", "held_out", "completion"}
    for row in (*figures["seen"], *figures["held_out"]):
        assert row.title in {f"a {word} one" for word in WORDS}
        assert row.labels[0] == "real"
        assert len(row.images) == 3
    for row in figures["completion"]:
        real, given, *drawn = row.images
        half = real.shape[1] // 2
        assert torch.equal(given[:, :half], real[:, :half])
        assert given[:, half:].unique().numel() == 1
        assert len(drawn) == 2


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"num_keep \(9\) must lie in 1 to num_candidates \(8\)"):
        GalleryConfig(num_candidates=8, num_keep=9, out="x")
