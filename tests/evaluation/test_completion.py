"""Completion: given tokens stay, only the drawn part counts, baselines are what they say."""

import pytest
import torch

from dalle_pytorch.evaluation import completion
from dalle_pytorch.evaluation.completion import (
    Completed,
    CompletionConfig,
    Eyes,
    complete,
    evaluate_completion,
)
from dalle_pytorch.evaluation.features import Extractor, lpips_each
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.page import Gallery, Table
from dalle_pytorch.evaluation.part import Part
from dalle_pytorch.evaluation.report import shown
from dalle_pytorch.generation.generator import Generator
from dalle_pytorch.generation.sampling import SamplingConfig
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.text import BPETokenizer

MEASURE = Measure({"split": "val"}, rounds=50, halves=0)
PROMPTS = ["a red apple", "a blue car", "a green tree", "a cat", "a dog"]
PARTS = CompletionConfig(rows=[0.25, 0.75], hole=[0.5]).parts(4)


def test_parts_of_a_grid_by_hand():
    assert list(PARTS.values()) == [Part(4, 1, 4, 0, 4), Part(4, 3, 4, 0, 4), Part(4, 1, 3, 1, 3)]
    assert list(PARTS) == ["rows_0.25", "rows_0.75", "hole_0.5"]
    kept = PARTS["hole_0.5"].keep().view(4, 4).int().tolist()
    assert kept == [[1, 1, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]
    assert PARTS["rows_0.25"].keep().tolist() == [True] * 4 + [False] * 12
    assert CompletionConfig().parts(4) == {}


@pytest.mark.parametrize("name", PARTS)
def test_pixels_of_a_part_are_those_of_its_tokens(name):
    part = PARTS[name]
    images = torch.rand(2, 3, 16, 16)
    mask = (~part.keep()).view(4, 4).repeat_interleave(4, dim=0).repeat_interleave(4, dim=1).expand(2, 3, -1, -1)
    assert torch.equal(part.crop(images).flatten(), images[mask])
    assert torch.equal(part.alone(images), torch.where(mask, images, 1.0))
    assert torch.equal(part.without(images)[~mask], images[~mask])
    assert part.without(images)[mask].unique().numel() == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rows": [0.0]}, r"complete\.rows must hold different shares"),
        ({"rows": [0.5, 0.5]}, r"complete\.rows must hold different shares"),
        ({"hole": [1.5]}, r"complete\.hole"),
        ({"num_pictures": 1}, "num_pictures"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"rows": [0.05]}, r"complete\.rows=0\.05 gives 0 of 4 token rows"),
        ({"hole": [0.95]}, r"complete\.hole=0\.95 is 4 of 4 tokens wide"),
    ],
)
def test_parts_that_cannot_be_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        CompletionConfig(**given).parts(4)


@pytest.fixture
def generator_of_pictures(make_dalle):
    tokenizer = BPETokenizer.train(PROMPTS, 300)
    dalle = make_dalle(text_vocab_size=tokenizer.vocab_size, text_len=12)
    dalle.text_tokenizer = tokenizer
    return Generator(dalle)


def run(generator, captions, image_tokens, part, **settings):
    options = {"num_candidates": 3, "seed": 4, "sampling": SamplingConfig(), **settings}
    return complete(generator, captions, image_tokens, part, **options)


@pytest.mark.parametrize("name", PARTS)
def test_given_tokens_stay_and_the_others_are_what_they_say(generator_of_pictures, name):
    part, image_tokens, counted = PARTS[name], torch.randint(12, (5, 16)), []
    before = image_tokens.clone()
    found = run(generator_of_pictures, PROMPTS, image_tokens, part, progress=counted.append)
    keep = part.keep()
    shapes = {way: tuple(tokens.shape) for way, tokens in found.image_tokens.items()}
    assert shapes == {"own": (5, 3, 16), "other_caption": (5, 3, 16), "copied": (5, 1, 16), "reconstructed": (5, 1, 16)}
    for way, tokens in found.image_tokens.items():
        assert (tokens[..., keep] == before[:, None, keep]).all()
        assert torch.equal(
            found.images[way].flatten(0, 1), generator_of_pictures.decode(tokens.flatten(0, 1)).clamp(0, 1)
        )
    assert torch.equal(image_tokens, before)
    assert torch.equal(found.image_tokens["copied"][:, 0, ~keep], before[[2, 3, 4, 0, 1]][:, ~keep])
    assert torch.equal(found.image_tokens["reconstructed"][:, 0], before)
    own = found.image_tokens["own"][..., ~keep]
    assert len(own.flatten(0, 1).unique(dim=0)) > 5  # completions differ
    assert sum(counted) == 2 * 15 * 16


def test_another_caption_is_that_of_the_picture_half_the_set_away(generator_of_pictures):
    part, image_tokens = PARTS["rows_0.25"], torch.randint(12, (4, 16))
    found = run(generator_of_pictures, PROMPTS[:4], image_tokens, part)
    swapped = run(generator_of_pictures, PROMPTS[2:4] + PROMPTS[:2], image_tokens, part)
    assert torch.equal(found.image_tokens["other_caption"], swapped.image_tokens["own"])
    assert not torch.equal(found.image_tokens["other_caption"], found.image_tokens["own"])


def test_one_picture_has_no_other(generator_of_pictures):
    with pytest.raises(ValueError, match="at least two"):
        run(generator_of_pictures, PROMPTS[:1], torch.zeros(1, 16, dtype=torch.long), PARTS["rows_0.25"])


def made(originals: torch.Tensor, part: Part, **off: float) -> Completed:
    """Two completions a way, grey levels off by so much in the part, and by far outside of it."""
    images = {}
    for way, error in off.items():
        wrong = originals + torch.where(part.alone(torch.zeros_like(originals)) == 0, error, 0.7)
        images[way] = torch.stack([wrong, originals + 3 * (wrong - originals)], dim=1)
    return Completed({}, images)


OFF = {"own": 0.1, "other_caption": 0.2, "copied": 0.3, "reconstructed": 0.0}


def test_only_the_drawn_part_counts():
    part, originals = PARTS["hole_0.5"], torch.rand(5, 3, 16, 16)
    metrics, sections = evaluate_completion(
        made(originals, part, **OFF),
        originals,
        part,
        "hole_0.5",
        PROMPTS,
        Eyes(MEASURE, None, None, PROMPTS),
        {"seed": 1, "sampling.top_k": "0"},
    )
    assert {name: metric.value for name, metric in metrics.items() if "l1" in name} == pytest.approx(
        {
            "complete_hole_0.5_l1": 0.2,  # the mean of once and three times as far off
            "complete_hole_0.5_l1_other_caption": 0.4,
            "complete_hole_0.5_l1_copied": 0.6,
            "complete_hole_0.5_l1_reconstructed": 0,
            "complete_hole_0.5_l1_gain_of_caption": 0.2,
        },
        abs=1e-6,
    )
    assert metrics["complete_hole_0.5_psnr"].value == pytest.approx(20 - 10 * 0.9542425 / 2, abs=1e-4)
    assert metrics["complete_hole_0.5_psnr_reconstructed"].value == 120
    assert metrics["complete_hole_0.5_l1"].count == 5
    assert metrics["complete_hole_0.5_l1"].protocol == {
        "split": "val", "part": "hole_0.5", "seed": 1, "sampling.top_k": "0",
    }  # fmt: skip
    assert metrics["complete_hole_0.5_l1_copied"].protocol == {"split": "val", "part": "hole_0.5", "seed": 1}
    assert [type(section) for section in sections] == [Table, Gallery]
    assert [row[1] for row in sections[0].rows] == [
        shown(metrics[f"complete_hole_0.5_l1{end}"].value)
        for end in ("", "_other_caption", "_copied", "_reconstructed")
    ]


def test_the_judge_sees_the_part_alone(monkeypatch, tiny_clip):
    """Features are the colour in the part's corner less that of the given one, which is white."""
    part = PARTS["rows_0.75"]
    seen = lambda images: images[:, :, -1, 0] + 1 - images[:, :, 0, 0]  # noqa: E731
    monkeypatch.setattr(completion, "clip_extractor", lambda judge: Extractor("clip", "x", "00" * 32, tiny_clip, seen))
    monkeypatch.setattr(completion, "caption_features", lambda judge, captions: torch.eye(3)[: len(captions)])
    originals = torch.eye(3)[:2, :, None, None].expand(-1, -1, 16, 16).contiguous()
    wrong = originals.flip(0)
    ways = {
        "own": (originals, wrong),
        "other_caption": (wrong, wrong),
        "copied": (wrong,),
        "reconstructed": (originals,),
    }
    completed = Completed({}, {way: torch.stack(parts, dim=1) for way, parts in ways.items()})
    eyes = Eyes(MEASURE, tiny_clip, None, ["red", "green", "blue"])
    metrics, sections = evaluate_completion(completed, originals, part, "x", ["red", "green"], eyes, {})
    for way, share in {"": 0.5, "_other_caption": 0, "_copied": 0, "_reconstructed": 1, "_real": 1}.items():
        assert metrics[f"complete_x_clip_score{way}"].value == pytest.approx(100 * share)
        assert metrics[f"complete_x_r_precision{way}"].value == share
    assert metrics["complete_x_clip_score"].extractor == "clip (the part alone, on white; x)"
    assert sections[0].rows[-1] == ("the original part", "", "", shown(100.0), shown(1.0))


def test_lpips_of_parts_that_are_large_enough():
    net, originals = LPIPS().eval(), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        for head in net.heads:
            head += 1.0
    found = {}
    for name, part in {"half": Part(4, 2, 4, 0, 4), "quarter": Part(4, 3, 4, 0, 4)}.items():
        completed = made(originals, part, **OFF)
        eyes = Eyes(MEASURE, None, net, PROMPTS)
        found[name], _ = evaluate_completion(completed, originals, part, "x", PROMPTS[:3], eyes, {})
        if name == "half":
            mine = completed.images["own"][:, :, :, 16:].flatten(0, 1)
            expected = lpips_each(net, mine, originals[:, :, 16:].repeat_interleave(2, dim=0)).mean().item()
    assert found["half"]["complete_x_lpips_vgg"].value == pytest.approx(expected, rel=1e-5)
    assert found["half"]["complete_x_lpips_vgg"].value > found["half"]["complete_x_lpips_vgg_reconstructed"].value == 0
    assert "complete_x_lpips_vgg" not in found["quarter"]  # eight pixels high
