"""Zero-shot classification with a CLIP whose features are known."""

import pytest
import torch
import torch.nn.functional as F

from dalle_pytorch.evaluation import zero_shot
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.zero_shot import class_features, evaluate_zero_shot

WORDS = [f"w{i}" for i in range(8)]
MEASURE = Measure({"data": "x"}, rounds=20)


@pytest.fixture
def clip(tiny_clip, monkeypatch):
    """A picture's feature is the axis its first pixel says, in tenths; a caption's the axis of its number."""
    axes = torch.eye(8)
    monkeypatch.setattr(zero_shot, "caption_features", lambda clip, names: axes[[int(name[1:]) for name in names]])
    monkeypatch.setattr(tiny_clip, "encode_image", lambda images: axes[(images[:, 0, 0, 0] * 10).round().long()])
    return tiny_clip


def pictures(numbers):
    images = torch.zeros(len(numbers), 3, 16, 16)
    images[:, 0, 0, 0] = torch.tensor(numbers) / 10
    return images


def test_accuracy_in_per_cent_of_pictures_with_a_class(clip):
    captions = {"concept": {word: [word] for word in WORDS}, "style": {"x": WORDS[:3], "y": WORDS[3:6]}}
    factors = [
        {"concept": "w0", "style": "x"}, {"concept": "w1", "style": "x"}, {"concept": "w2", "style": "y"},
        {"concept": "w4"}, {"concept": "unseen"},
    ]  # fmt: skip
    found = evaluate_zero_shot(clip, pictures([0, 1, 3, 5, 0]), factors, captions, MEASURE).metrics
    # w0 and w1 are found; w2 and w4 are not, and tie with all that are not shown, which counts against them
    assert found["zero_shot_concept_top1"].value == 50
    assert found["zero_shot_concept_top5"].value == 50
    assert found["zero_shot_concept_top1"].count == 4
    assert found["zero_shot_concept_top1"].protocol == {"data": "x", "classes": 8, "captions": 8}
    assert found["zero_shot_style_top1"].value == 100
    assert found["zero_shot_style_top1"].unit == "%"
    assert "zero_shot_style_top5" not in found


def test_chance_is_what_a_model_without_knowledge_gets(clip, monkeypatch, generator):
    noise = F.normalize(torch.randn(800, 16, generator=generator), dim=1)
    table = F.normalize(torch.randn(8, 16, generator=generator), dim=1)
    monkeypatch.setattr(zero_shot, "caption_features", lambda clip, names: table[[int(name[1:]) for name in names]])
    taken = iter(noise.split(32))
    monkeypatch.setattr(clip, "encode_image", lambda images: next(taken))
    factors = [{"concept": WORDS[int(i)]} for i in torch.randint(8, (800,), generator=generator)]
    captions = {"concept": {word: [word] for word in WORDS}}
    found = evaluate_zero_shot(clip, torch.zeros(800, 3, 16, 16), factors, captions, MEASURE).metrics
    assert found["zero_shot_concept_top1"].value == pytest.approx(100 / 8, abs=4)  # 3.4 standard errors
    assert found["zero_shot_concept_top5"].value == pytest.approx(500 / 8, abs=6)


def test_a_class_is_the_mean_of_its_captions():
    found = class_features([[torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [torch.tensor([0.0, 2.0])]])
    assert torch.allclose(found, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_data_without_factors_have_no_such_numbers(clip):
    assert evaluate_zero_shot(clip, pictures([0, 1]), [{}, {}], {}, MEASURE) == ({}, [])
    captions = {"concept": {"a": ["w0"], "b": ["w1"]}}
    assert evaluate_zero_shot(clip, pictures([0, 1]), [{"concept": "a"}, {}], captions, MEASURE).metrics == {}
