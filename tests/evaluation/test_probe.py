"""Caption following against loops over prompts and candidates, with a probe that reads a picture's first pixels."""

import pytest
import torch
from torch import nn

from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.probe import KEPT, evaluate_following, evaluate_probe, matches
from dalle_pytorch.models.probe import UNKNOWN, Probe, ProbeConfig

CLASSES = {"style": ["flat", "round"], "thing": ["a", "b", "c", "d", "e", "f", "g"]}
MEASURE = Measure({"data": "x"}, rounds=20)


class Reader(Probe):
    """Sees the value that the first pixel of each channel says, in tenths."""

    def forward(self, images):
        found = {}
        for channel, (name, values) in enumerate(self.config.classes.items()):
            own = (images[:, channel, 0, 0] * 10).round().long()
            found[name] = nn.functional.one_hot(own, len(values)).float() - torch.arange(len(values)) / 100
        return found


@pytest.fixture
def reader():
    return Reader(ProbeConfig(image_size=8, width=8, stages=1, classes=CLASSES))


def pictures(values):
    """Pictures [..., 3, 8, 8] that show these values [..., 2]."""
    images = torch.zeros(*values.shape[:-1], 3, 8, 8)
    images[..., :2, 0, 0] = values / 10
    return images


def drawn(generator, prompts, count):
    high = torch.tensor([2, 7])
    draw = lambda *shape: (torch.rand(*shape, 2, generator=generator) * high).long()  # noqa: E731
    asked = [{"style": CLASSES["style"][s], "thing": CLASSES["thing"][t]} for s, t in draw(prompts).tolist()]
    return asked, draw(prompts, count), draw(prompts)


def test_shares_are_those_of_a_loop(reader, generator):
    asked, seen, real = drawn(generator, 9, 4)
    del asked[3]["style"]  # not told
    asked[5]["thing"] = "z"  # not known
    ranks = torch.rand(9, 4, generator=generator)
    found = evaluate_following(
        reader, pictures(seen), asked, pictures(real), MEASURE, ranks=ranks, how={"seed": 1}
    ).metrics
    labels = reader.labels(asked)
    for column, name in enumerate(CLASSES):
        rows = [p for p in range(9) if labels[p, column] != UNKNOWN]
        assert len(rows) == 8
        hits = [[float(seen[p, m, column] == labels[p, column]) for m in range(4)] for p in rows]
        assert found[f"follows_{name}"].value == pytest.approx(sum(map(sum, hits)) / 32)
        assert found[f"follows_{name}"].count == 8
        assert found[f"follows_{name}"].protocol == {"data": "x", "seed": 1, "classes": len(CLASSES[name])}
        others = [
            float(seen[p, m, column] == labels[q, column]) for p in rows for m in range(4) for q in rows if p != q
        ]
        assert found[f"follows_{name}_shuffled"].value == pytest.approx(sum(others) / len(others))
        best = [float(seen[p, int(ranks[p].argmax()), column] == labels[p, column]) for p in rows]
        assert found[f"follows_{name}_best_of_4"].value == pytest.approx(sum(best) / 8)
        assert found[f"follows_{name}_best_of_1"].value == pytest.approx(found[f"follows_{name}"].value)
        own = [float(real[p, column] == labels[p, column]) for p in rows]
        assert found[f"follows_{name}_real"].value == pytest.approx(sum(own) / 8)
        assert "seed" not in found[f"follows_{name}_real"].protocol
    rows = [p for p in range(9) if p not in (3, 5)]
    both = [float((seen[p, m] == labels[p]).all()) for p in rows for m in range(4)]
    assert found["follows_all"].value == pytest.approx(sum(both) / 28)
    assert found["follows_all"].count == 7
    assert found["follows_all"].protocol["classes"] == 14


def test_pictures_that_show_what_is_asked_score_one_and_exchanged_ones_less(reader):
    values = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 3]])
    asked = [{"style": CLASSES["style"][s], "thing": CLASSES["thing"][t]} for s, t in values.tolist()]
    images = pictures(values)[:, None]
    found = evaluate_following(reader, images, asked, images[:, 0], MEASURE, words=KEPT).metrics
    assert {name: metric.value for name, metric in found.items()} == {
        "kept_style": 1, "kept_style_shuffled": pytest.approx(1 / 3), "kept_style_real": 1,
        "kept_thing": 1, "kept_thing_shuffled": 0, "kept_thing_real": 1,
        "kept_all": 1, "kept_all_shuffled": 0, "kept_all_real": 1,
    }  # fmt: skip
    assert found["kept_style"].extractor == "probe (probe at 8 pixels, 128 features)"


def test_what_fewer_than_two_prompts_ask_for_is_left_out(reader, generator):
    asked, seen, real = drawn(generator, 4, 2)
    asked = [{"thing": "a"}, {"thing": "b"}, {"style": "flat"}, {}]
    found = evaluate_following(reader, pictures(seen), asked, pictures(real), MEASURE)
    assert set(found.metrics) == {"follows_thing", "follows_thing_shuffled", "follows_thing_real"}
    nothing = evaluate_following(reader, pictures(seen), [{}] * 4, pictures(real), MEASURE)
    assert nothing.metrics == {}


def test_what_is_not_told_may_be_anything():
    seen = torch.tensor([[[0, 3]], [[1, 2]]])
    told = torch.tensor([[0, UNKNOWN], [1, 3], [UNKNOWN, UNKNOWN]])
    assert matches(seen, told).tolist() == [[[True, False, True]], [[False, False, True]]]


def test_accuracy_of_the_probe_itself(reader):
    shown = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 6]])
    factors = [{"style": "flat", "thing": "a"}, {"style": "flat", "thing": "c"}, {"thing": "z"}, {"thing": "g"}]
    found = evaluate_probe(reader, pictures(shown), factors, MEASURE).metrics
    # "c" is the third guess where "b" is the first: right after "a", whose number is smaller
    assert {name: (metric.value, metric.count) for name, metric in found.items()} == {
        "accuracy_style": (0.5, 2), "accuracy_thing": (pytest.approx(2 / 3), 3), "accuracy_thing_top5": (1, 3),
    }  # fmt: skip
    assert found["accuracy_thing"].protocol["classes"] == 7
