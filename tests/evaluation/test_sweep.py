"""Sweeps of sampling: which combinations there are, which are best, and what is refused."""

import itertools
import re
import sys

import pytest
import torch

from dalle_pytorch.evaluation import dalle as module
from dalle_pytorch.evaluation import page
from dalle_pytorch.evaluation.features import Extractor
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.page import Gallery, Table
from dalle_pytorch.evaluation.scatter import Point, Scatter, draw_scatter
from dalle_pytorch.evaluation.sweep import SweepConfig, evaluate_sweep, pareto_best
from dalle_pytorch.generation.sampling import SamplingConfig

MEASURE = Measure({"split": "val"}, rounds=50, halves=0)


def test_every_combination_once_and_the_rest_as_it_is():
    sweep = SweepConfig(temperature=[0.5, 1.0], top_k=[0, 8, 4])
    found = sweep.settings(SamplingConfig(min_p=0.25, top_k=3))
    assert [(s.temperature, s.top_k) for s in found.values()] == [(0.5, 0), (0.5, 8), (0.5, 4), (1, 0), (1, 8), (1, 4)]
    assert {s.min_p for s in found.values()} == {0.25}
    assert list(found)[1] == "temperature=0.5, top_k=8"
    assert SweepConfig().settings(SamplingConfig()) == {}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_k": []}, r"sweep\.top_k is an empty list"),
        ({"cfg_scale": [1.0, 1.0]}, r"sweep\.cfg_scale must hold different values"),
        ({"temperature": [1.0, -1.0]}, r"sweep with temperature=-1: temperature must not be negative"),
        ({"top_p": [0.0]}, r"sweep with top_p=0: top_p"),
    ],
)
def test_a_wrong_sweep_names_the_value(given, said):
    with pytest.raises(ValueError, match=said):
        SweepConfig(**given).settings(SamplingConfig())


def test_guidance_cannot_be_swept_beside_a_schedule():
    with pytest.raises(ValueError, match=r"sweep with cfg_scale=2: cfg_scale=2.0 and cfg_schedule"):
        SweepConfig(cfg_scale=[2.0]).settings(SamplingConfig(cfg_schedule=[1.0, 3.0]))


def test_pareto_by_hand():
    """The third is worse than the first in both, the fourth equals it in score and is farther; twins both stay."""
    assert pareto_best([3.0, 5.0, 2.0, 3.0, 5.0], [1.0, 2.0, 1.5, 1.5, 2.0]) == [True, True, False, False, True]


def test_of_the_best_points_none_beats_another_and_the_others_are_beaten(generator):
    scores, distances = torch.randint(6, (2, 40), generator=generator).double().tolist()
    best = pareto_best(scores, distances)
    front = sorted({(s, -d) for s, d, kept in zip(scores, distances, best, strict=True) if kept})
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(front))
    for s, d, kept in zip(scores, distances, best, strict=True):
        assert kept == ((s, -d) in front)
        assert any(fs >= s and -fd <= d for fs, fd in front)


@pytest.fixture
def found(monkeypatch, tiny_clip):
    """A sweep over pictures of pure colour, whose feature is their colour; hotter settings draw the wrong one more."""
    extractor = Extractor("clip", "colours", "00" * 32, tiny_clip, lambda images: images[:, :, 0, 0])
    monkeypatch.setattr(module, "clip_extractor", lambda judge: extractor)
    monkeypatch.setattr(module, "caption_features", lambda judge, captions: torch.eye(3)[: len(captions)])
    own = torch.eye(3)[:2, :, None, None].expand(-1, -1, 16, 16).contiguous()
    asked = []

    def draw(sampling):
        asked.append(sampling)
        colours = torch.tensor([[0] * 4, [1] * 4])
        colours[:, : sampling.top_k] = 2
        return torch.eye(3)[colours][..., None, None].expand(-1, -1, -1, 16, 16).contiguous()

    settings = SweepConfig(top_k=[2, 0, 3]).settings(SamplingConfig())
    evaluation = evaluate_sweep(
        draw, settings, ["red", "green"], own.repeat(2, 1, 1, 1), own, MEASURE,
        judge=tiny_clip, captions=["red", "green", "blue"], extractors=[extractor],
        how=lambda sampling: {"top_k": sampling.top_k},
    )  # fmt: skip
    assert asked == list(settings.values())
    return evaluation


def test_every_setting_is_judged_by_its_own_pictures(found):
    metrics, (plot, table, pictures) = found
    for top_k in (0, 2, 3):
        one = metrics[f"clip_score_at_top_k_{top_k}"]
        assert one.value == pytest.approx(25 * (4 - top_k))
        assert one.protocol == {"split": "val", "top_k": top_k}
        assert metrics[f"r_precision_at_top_k_{top_k}"].value == pytest.approx((4 - top_k) / 4)
    assert metrics["fid_clip_at_top_k_0"].value < metrics["fid_clip_at_top_k_2"].value
    assert not [name for name in metrics if "real" in name]
    assert isinstance(plot, Scatter)
    assert isinstance(table, Table)
    assert isinstance(pictures, Gallery)
    assert [row[0] for row in table.rows] == ["top_k=0", "top_k=2", "top_k=3"]
    assert [point.name for point in plot.points if point.marked] == ["top_k=0"]  # nearest in both
    assert [row[-1] for row in table.rows] == ["yes", "", ""]


POINTS = [
    Point("a=1 & b", 1.0, 2.0, True, (0.5, 1.5), (1.0, 3.0)),
    Point("a=2", 0.5, 3.0),
    Point("a=3", 2.0, 5.0, True),
]


def test_a_scatter_is_a_plot_and_a_table(monkeypatch):
    pytest.importorskip("matplotlib")
    scatter = Scatter("Trade-off", "down is better", "score", "far", POINTS, "best <of all>")
    with_plot = page.section(scatter)
    assert with_plot.count("<img") == 1
    assert draw_scatter(scatter) == draw_scatter(scatter)
    assert draw_scatter(scatter._replace(points=POINTS[:1])) != draw_scatter(scatter)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    without = page.section(scatter)
    assert "<img" not in without
    for text in (with_plot, without):
        assert re.search(r"a=1 &amp; b</td><td class=.n.>1\S*</td><td class=.n.>2\S*</td><td>best &lt;of all&gt;", text)
        assert text.count("best &lt;of all&gt;") == 2
