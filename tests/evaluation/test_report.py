"""Records that say how they came about, comparisons that are refused, a page that stands alone."""

import json
import math
import re
import shutil
import sys

import pytest
import torch
from PIL import Image

from dalle_pytorch.commands import evaluate
from dalle_pytorch.evaluation import page
from dalle_pytorch.evaluation.page import Gallery, Line, Picture, Plot, Table
from dalle_pytorch.evaluation.report import Metric, Record, Subject, compare, read, shown, write
from dalle_pytorch.evaluation.topics import HEADLINES, TOPICS, grouped, headlines, words
from dalle_pytorch.generation.grid import GridRow

SUBJECT = Subject(kind="vae", weights_sha256="ab" * 32, step=3)
PROTOCOL = {"split": "val", "image_size": 64}


def metric(value=1.5, **settings):
    return Metric(**{"value": value, "count": 10, "protocol": PROTOCOL, **settings})


def looked_through(value=9.0, **settings):
    given = {"extractor": "clip at 64", "weights_sha256": "cd" * 32, "better": "lower", "interval": (8.0, 11.0)}
    return metric(value, **{**given, **settings})


def record(**metrics):
    return Record(SUBJECT, metrics)


def test_what_is_written_is_read_and_equal_records_are_equal_bytes(tmp_path):
    one = record(psnr=metric(), fid_clip=looked_through())
    other = Record(SUBJECT, dict(reversed(one.metrics.items())))
    write(one, tmp_path / "a.json")
    write(other, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read(tmp_path / "a.json") == one
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["metrics"]["fid_clip"] == {
        "value": 9.0, "count": 10, "interval": [8.0, 11.0], "protocol": PROTOCOL, "extractor": "clip at 64",
        "weights_sha256": "cd" * 32, "unit": "", "better": "lower",
    }  # fmt: skip
    assert not re.search("time|date", (tmp_path / "a.json").read_text())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"value": math.nan}, "value is nan"),
        ({"value": math.inf}, "value is inf"),
        ({"count": 0}, "count"),
        ({"interval": (2.0, 1.0)}, "lower end first"),
        ({"extractor": "clip"}, "belong together"),
        ({"better": "more"}, "higher, lower or neither"),
    ],
)
def test_numbers_that_say_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        metric(**settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"protocol": {**PROTOCOL, "split": "test"}}, r"protocol\.split is 'val' in a and 'test' in b"),
        ({"protocol": {"split": "val"}}, r"protocol\.image_size is 64 in a and 'not given' in b"),
        ({"count": 11}, "count is 10 in a and 11 in b"),
        ({"extractor": "clip at 32"}, "extractor is 'clip at 64' in a and 'clip at 32' in b"),
        ({"weights_sha256": "ef" * 32}, "weights_sha256 is 'cdcd"),
        ({"unit": "dB"}, "unit is '' in a"),
    ],
)
def test_unlike_protocols_are_refused_with_the_field_that_differs(change, said):
    first, second = record(psnr=metric(), fid=looked_through()), record(psnr=metric(), fid=looked_through(**change))
    with pytest.raises(ValueError, match=said) as refused:
        compare(first, second, names=("a", "b"))
    assert "fid" in str(refused.value)
    assert "evaluate both alike" in str(refused.value)
    compare(first, first)


def test_other_models_and_values_may_be_compared():
    second = Record(Subject(kind="vae", weights_sha256="00" * 32), {"psnr": metric(2.5), "ssim": metric()})
    (difference,) = compare(record(psnr=metric()), second)
    assert (difference.name, difference.first.value, difference.second.value) == ("psnr", 1.5, 2.5)
    assert difference.apart is None


def test_records_without_a_common_number_are_refused():
    with pytest.raises(ValueError, match="no number is in both: the first has psnr; the second has fid"):
        compare(record(psnr=metric()), record(fid=looked_through()))


def test_the_command_prints_a_table_or_one_line(tmp_path, capsys, monkeypatch):
    def command(*files):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "compare", *map(str, files)])
        try:
            evaluate.run()
        except SystemExit as stop:
            return stop.code
        return 0

    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    write(record(psnr=metric(), fid_clip=looked_through()), a)
    write(record(psnr=metric(2.0), fid_clip=looked_through(5.0, interval=(4.0, 6.0)), ssim=metric()), b)
    write(record(psnr=metric(protocol={**PROTOCOL, "split": "test"})), c)
    for name, file in (("first", a), ("second", b)):
        (tmp_path / name).mkdir()
        shutil.copy(file, tmp_path / name / "metrics.json")
    assert command(tmp_path / "first", tmp_path / "second") == 0  # what out= named will do
    capsys.readouterr()
    assert command(a, b) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.search(r"psnr\s+1\.500\s+2\.000\s+\+0\.5000\s+10\s+second better, no interval", lines[2])
    assert re.search(r"9\.000 \[8\.000, 11\.00\].*-4\.000\s+10\s+second better, intervals part", lines[1])
    assert lines[3] == f"only in {b}: ssim"
    assert command(a, c) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: measured in two ways, so not to be compared: psnr: protocol.split is 'val' in")
    write(record(psnr=metric(2.0), fid_clip=looked_through(count=11)), c)
    assert command(a, c) == 1
    out, error = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["metric", "psnr"]
    assert error.startswith("error: left out, since measured in two ways: fid_clip (fid_clip: count is 10 in")
    assert error.count("\n") == 1
    assert "usage" in command(a)
    assert command(a, tmp_path / "none.json") == 1
    assert "none.json" in capsys.readouterr().err
    for content in ("{}", "[]", '{"version": 1, "metrics": []}', '{"version": 1, "metrics": {"x": {"interval": [1]}}}'):
        b.write_text(content)
        assert command(a, b) == 1
        assert "is no metrics.json" in capsys.readouterr().err
    assert command(a, a) == 0
    assert "equal" in capsys.readouterr().out


def test_numbers_are_shown_with_four_digits():
    assert [shown(v) for v in (0.12346, 1.23456, -12.3456, 123.456, 12345.6, 1e-6, 3e7, 0.00091234)] == [
        "0.1235", "1.235", "-12.35", "123.5", "12346", "1.000e-06", "3.000e+07", "0.0009123",
    ]  # fmt: skip
    assert [shown(v) for v in (0.99999, 9.99999, 999.99, 999.94)] == ["1.000", "10.00", "1000", "999.9"]
    assert [shown(v) for v in (0, 16.0, -3, 956.0, 100)] == ["0", "16.00", "-3.000", "956", "100"]


SECTIONS = [
    Picture("Best & worst", "left <original>", Image.fromarray(torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())),
    Gallery("Drawn", "by the model", [GridRow("a <cat>", [torch.rand(3, 32, 32)] * 2, ["#1", "#2 & more"])]),
    Table("Files", "bytes", ("codec", "PSNR"), [("JPEG", "20")]),
    Plot(
        "Best of N",
        "rises",
        "N",
        "score",
        [1, 2, 4],
        [Line("clip", [0.1, 0.2, 0.25], [0, 0.1, 0.2], [0.2, 0.3, 0.3])],
        True,
    ),
]


@pytest.mark.parametrize("matplotlib", [True, False])
def test_the_page_stands_alone_with_or_without_matplotlib(tmp_path, monkeypatch, matplotlib):
    if matplotlib:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("a.html", "b.html"):
        page.write(record(psnr=metric(unit="dB", interval=(1.0, 2.0))), SECTIONS, tmp_path / name, title="A <vae>")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.html").read_text(encoding="utf-8")
    assert text.count("<img") == 3 + matplotlib
    assert text.count("data:image/svg+xml") == matplotlib
    assert not re.search(r'(?:src|href)="(?!data:|#)|@import|<script|url\(', text)
    assert set(re.findall(r'href="#(\w+)"', text)) == set(re.findall(r'section id="(\w+)"', text))
    assert "a &lt;cat&gt;" in text
    assert "#2 &amp; more" in text
    assert "A &lt;vae&gt;" in text
    assert "left &lt;original&gt;" in text
    for part in ("1.500 <small>dB<", "1.000 to 2.000", "split = val", "JPEG", "0.2500", "abababababab"):
        assert part in text


def test_every_number_is_on_the_page_once_and_what_all_share_is_said_once():
    metrics = {name: metric(protocol={**PROTOCOL, "how": name}) for name in ("psnr", "jpeg_psnr", "codebook_used")}
    text = page.numbers(record(**metrics))
    for name in metrics:
        assert text.count(f"<td>{page.code(name)}") == 1
        assert text.count(f"how = {name}") == 1
    assert text.count("split = val") == 1
    assert page.common(record(**metrics)) == PROTOCOL
    assert "<summary>JPEG and WebP: 1 numbers" in text


def test_headlines_come_with_their_interval_and_what_they_are_read_beside():
    given = {"image_nats": metric(3.0, interval=(2.5, 3.5)), "image_nats_unigram": metric(6.5), "psnr": metric(21.5)}
    psnr, nats = page.cards(record(**given)).split('<div class="card">')[1:]
    assert "<code>psnr</code>" in psnr
    assert "95 %: 2.500 to 3.500<br>frequencies alone: 6.500" in nats
    assert page.cards(record(jpeg_psnr=metric())) == ""


def test_numbers_are_grouped_in_their_order_folded_ones_last():
    names = ["psnr", "rfid_clip", "webp_psnr", "ssim", "gain_of_caption", "clip_score_best_of_4", "clip_score", "new"]
    groups = [(topic.title, members) for topic, members in grouped(names)]
    assert groups == [
        ("Reconstructions, one by one", ["psnr", "ssim"]),
        ("Reconstructions as a set", ["rfid_clip"]),
        ("Likelihood of held-out pairs", ["gain_of_caption"]),
        ("Pictures and their captions", ["clip_score"]),
        ("Other numbers", ["new"]),
        ("JPEG and WebP", ["webp_psnr"]),
        ("Best of N", ["clip_score_best_of_4"]),
    ]
    assert headlines(["ssim", "new", "psnr"]) == ["psnr", "ssim"]
    assert len(headlines(HEADLINES)) < len(HEADLINES)
    assert TOPICS[-1].title == "Other numbers"


def test_numbers_in_words():
    assert words("text_to_image_r10") == "a right picture among the first 10"
    assert words("follows_style_real") == "the same of the real pictures: style"
    assert words("ms_ssim_3_scales") == words("ms_ssim") != words("ssim")
    assert words("fid_clip_blur_2") == words("fid")
    assert words("unheard_of") == ""
