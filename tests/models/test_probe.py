"""The probe: labels, what a loss counts, independence of the batch, saving."""

import math

import pytest
import torch
import torch.nn.functional as F

from dalle_pytorch import load, save
from dalle_pytorch.checkpoints.checkpoint import weights_sha256
from dalle_pytorch.models.probe import STEPS, UNKNOWN, Probe, ProbeConfig, histograms

CLASSES = {"style": ["flat", "round"], "concept": ["apple", "cat", "dog"]}


@pytest.fixture
def probe():
    return Probe(
        ProbeConfig(image_size=16, width=8, stages=2, dropout=0.0, label_smoothing=0.0, classes=CLASSES)
    ).eval()


def test_labels_follow_the_order_of_the_classes(probe):
    rows = [{"style": "round", "concept": "dog"}, {"concept": "bird"}, {"style": "flat", "size": "big"}]
    assert probe.labels(rows).tolist() == [[1, 2], [UNKNOWN, UNKNOWN], [0, UNKNOWN]]
    assert probe.labels([]).shape == (0, 2)


def test_features_do_not_depend_on_the_other_pictures(probe):
    images = torch.rand(4, 3, 16, 16)
    features = probe.encode_image(images)
    # convolutions of other batches may add up their 3 x 3 x 16 products in another order
    atol = 144 * torch.finfo(torch.float32).eps * float(features.detach().abs().max())
    torch.testing.assert_close(probe.encode_image(images[1:2]), features[1:2], atol=atol, rtol=0)
    assert features.shape == (4, 128)
    assert {name: logits.shape for name, logits in probe(images).items()} == {"style": (4, 2), "concept": (4, 3)}


def test_histograms_count_colours_and_steps_but_not_places():
    images = torch.rand(3, 3, 8, 8)
    found = histograms(images, 4)
    assert found.shape == (3, 4**3 + 2 * (len(STEPS) + 1))
    colours, across, down = found.square().split([4**3, len(STEPS) + 1, len(STEPS) + 1], dim=1)
    for part in (colours, across, down):
        assert torch.allclose(part.sum(dim=1), torch.ones(3))
    assert torch.equal(histograms(images.flip(2, 3), 4), found)
    assert torch.equal(histograms(images.mT, 4)[:, 4**3 :], torch.cat([down, across], dim=1).sqrt())
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(1, 3, 8, 8)
    assert histograms(red, 2)[0].nonzero().flatten().tolist() == [4, 8, 8 + len(STEPS) + 1]  # one colour, no steps
    shaded = red * torch.linspace(0.9, 1, 8)  # steps of 0.014 across, none downwards, nor in green and blue
    kinds = histograms(shaded, 2)[0].square()[8:].view(2, -1)
    assert kinds[0].tolist() == pytest.approx([2 / 3, 0, 1 / 3, *[0] * (len(STEPS) - 2)])
    assert kinds[1].tolist() == pytest.approx([1, *[0] * len(STEPS)])


def test_histograms_reach_the_features(probe):
    images = torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    net = Probe(ProbeConfig(**{**vars(probe.config), "colours": 3})).eval()
    with torch.no_grad():
        net.to_features.weight.zero_()
    assert not torch.allclose(net.encode_image(images)[0], net.encode_image(images)[1])
    assert net.bfloat16().encode_image(images.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="colours must not be negative, got -1"):
        ProbeConfig(colours=-1)


def test_other_sizes_are_scaled(probe):
    images = torch.rand(2, 3, 16, 16)
    large = F.interpolate(images, scale_factor=2, mode="nearest")
    small = F.interpolate(large, (16, 16), mode="bilinear", antialias=True)
    assert torch.allclose(probe.encode_image(large), probe.encode_image(small))
    with pytest.raises(ValueError, match="1 channels"):
        probe.encode_image(torch.rand(2, 1, 16, 16))


def test_the_loss_is_the_mean_over_factors_of_known_labels(probe):
    images = torch.rand(3, 3, 16, 16)
    labels = torch.tensor([[0, UNKNOWN], [UNKNOWN, UNKNOWN], [1, 2]])
    logits = probe(images)
    style = F.cross_entropy(logits["style"][[0, 2]], torch.tensor([0, 1]))
    concept = F.cross_entropy(logits["concept"][[2]], torch.tensor([2]))
    assert torch.allclose(probe.loss(images, labels), (style + concept) / 2)
    assert probe.loss(images, torch.full((3, 2), UNKNOWN)) == 0
    with torch.no_grad():
        for head in probe.heads:
            head.weight.zero_()
            head.bias.zero_()
    loss = probe.loss(images, torch.zeros(3, 2, dtype=torch.long))
    assert loss.item() == pytest.approx((math.log(2) + math.log(3)) / 2)


def test_it_learns_a_batch_by_heart(probe):
    images, labels = torch.rand(6, 3, 16, 16), torch.tensor([[0, 0], [1, 1], [0, 2], [1, 0], [0, 1], [1, 2]])
    optimizer = torch.optim.Adam(probe.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        probe.loss(images, labels).backward()
        optimizer.step()
    seen = torch.stack([logits.argmax(dim=1) for logits in probe(images).values()], dim=1)
    assert torch.equal(seen, labels)


@pytest.mark.parametrize("name", ["probe.safetensors", "probe.pt"])
def test_it_is_saved_with_its_classes(probe, tmp_path, name):
    save(probe, tmp_path / name)
    again = load(tmp_path / name, kind="probe")
    assert again.config == probe.config
    assert weights_sha256(again) == weights_sha256(probe)
    assert list(again.config.classes) == ["style", "concept"]
    with pytest.raises(ValueError, match="a clip is needed"):
        load(tmp_path / name, kind="clip")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_size": 18}, "image_size must be a multiple of 2 \\*\\* stages = 4, got 18"),
        ({"width": 12}, "width must be a multiple of 8, got 12"),
        ({"cells": 5}, "cells must be at most image_size / 2 \\*\\* stages = 4, got 5"),
        ({"stages": 0}, "stages must be at least 1"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie in"),
        ({"classes": {"style": ["a"]}}, "classes.style must be two or more different values"),
        ({"classes": {"style": ["a", "a"]}}, "classes.style must be two or more different values"),
        ({"classes": {"all": ["a", "b"]}}, "factor 'all'"),
        ({"classes": {"a.b": ["a", "b"]}}, "factor 'a.b'"),
    ],
)
def test_settings_out_of_range_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        ProbeConfig(**{"image_size": 16, "stages": 2, "classes": CLASSES, **settings})


def test_a_probe_needs_classes():
    with pytest.raises(ValueError, match="needs classes"):
        Probe(ProbeConfig())
