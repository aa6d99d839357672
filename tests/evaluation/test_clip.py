"""A CLIP's numbers: retrieval both ways, with equal captions as right answers."""

import math

import pytest
import torch

from dalle_pytorch.evaluation import clip as module
from dalle_pytorch.evaluation.clip import evaluate_clip
from dalle_pytorch.evaluation.features import Extractor
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.page import Gallery, Table

MEASURE = Measure({"split": "val"}, rounds=50)


@pytest.fixture
def fixed(monkeypatch, tiny_clip):
    """Use given features in place of a model's."""

    def use(texts, pictures):
        extractor = Extractor("clip", "given", "00" * 32, tiny_clip, lambda images: pictures)
        monkeypatch.setattr(module, "clip_extractor", lambda clip: extractor)
        monkeypatch.setattr(module, "caption_features", lambda clip, captions: texts)

    return use


def test_retrieval_both_ways(fixed, tiny_clip):
    """Twelve pairs on axes of their own, but for two pictures that are swapped."""
    order = torch.tensor([1, 0, *range(2, 12)])
    fixed(torch.eye(12), torch.eye(12)[order])
    metrics, sections = evaluate_clip(tiny_clip, [f"c{i}" for i in range(12)], torch.rand(12, 3, 16, 16), MEASURE)
    for way in ("text_to_image", "image_to_text"):
        assert metrics[f"{way}_r1"].value == pytest.approx(100 * 10 / 12)
        # the two wrong ones tie with ten others at cosine 0, and a tie counts against them
        assert metrics[f"{way}_r10"].value == pytest.approx(100 * 10 / 12)
        assert metrics[f"{way}_r1"].protocol["candidates"] == 12
    assert metrics["clip_score"].value == pytest.approx(100 * 10 / 12)
    assert [type(section) for section in sections] == [Table, Gallery]
    assert sections[0].rows[0][4] == "8.333"


def test_pictures_with_one_caption_are_all_right(fixed, tiny_clip):
    """Three pictures, two of one caption: the caption may find either."""
    pictures = torch.tensor([[0.6, 0.8], [0.8, -0.6], [0.7, 0.714]])
    fixed(torch.eye(2), pictures)
    metrics, _ = evaluate_clip(tiny_clip, ["a", "a", "b"], torch.rand(3, 3, 16, 16), MEASURE)
    # a: 0.6 0.8 right, 0.7 wrong -> found; b: 0.8 -0.6 wrong, 0.714 right -> not found
    assert metrics["text_to_image_r1"].value == pytest.approx(50)
    assert metrics["text_to_image_r1"].count == 2
    # picture 0: a 0.6, b 0.8 -> wrong; 1: a 0.8 -> right; 2: b 0.714 against a 0.7 -> right
    assert metrics["image_to_text_r1"].value == pytest.approx(100 * 2 / 3)
    assert "text_to_image_r5" not in metrics  # of three it says nothing


def test_the_scale_is_calibrated_for_choices_of_captions(fixed, tiny_clip):
    fixed(torch.eye(12), torch.eye(12)[torch.tensor([1, 0, *range(2, 12)])])
    captions, images = [f"c{i}" for i in range(12)], torch.rand(12, 3, 16, 16)
    metrics, _ = evaluate_clip(tiny_clip, captions, images, MEASURE)
    assert metrics["logit_scale"].value == pytest.approx(1 / 0.07, rel=1e-5)
    # ten of twelve right, among twelve at cosine 0 but one at 1: exp(s) / (exp(s) + 11) = 5 / 6
    best = math.log(55)
    assert metrics["logit_scale_best"].value == pytest.approx(best, rel=1e-4)
    entropy = -(10 * math.log(5 / 6) + 2 * math.log(1 / 66)) / 12
    assert metrics["caption_nats_best_scale"].value == pytest.approx(entropy, rel=1e-4)
    assert metrics["caption_nats"].value > metrics["caption_nats_best_scale"].value
    assert metrics["calibration_error"].value == pytest.approx(1 - 10 / 12, abs=1e-3)  # sure of all
    tiny_clip.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))
    metrics, _ = evaluate_clip(tiny_clip, captions, images, MEASURE)
    assert "calibration_error" not in metrics


def test_too_few_pairs_are_refused(tiny_clip):
    with pytest.raises(ValueError, match="at least two pairs"):
        evaluate_clip(tiny_clip, ["a"], torch.rand(1, 3, 16, 16), MEASURE)
    with pytest.raises(ValueError, match="text_tokenizer"):
        evaluate_clip(tiny_clip, ["a", "b"], torch.rand(2, 3, 16, 16), MEASURE)
