"""Pixel metrics in closed form, and as scikit-image and numpy have them."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from dalle_pytorch.evaluation.reconstruction import (
    SCALES,
    l1_each,
    ms_ssim_each,
    ms_ssim_scales,
    psnr_each,
    ssim_each,
)

SKIMAGE = {"psnr": 26.25811582209365, "ssim": 0.9016211869954164}  # 0.26.0, reference/classical.py


@pytest.fixture
def pair(classical):
    """The fixed pictures as a batch of one, worse copy first."""
    original, worse = (torch.from_numpy(p).permute(2, 0, 1)[None].contiguous() for p in classical.pictures())
    return worse, original


def test_constant_errors_have_known_values():
    targets = torch.rand(2, 3, 16, 16) * 0.5
    errors = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr_each(targets + errors, targets).tolist() == pytest.approx([20, 40], abs=1e-3)
    assert l1_each(targets + errors, targets).tolist() == pytest.approx([0.1, 0.01], abs=1e-6)


def test_equal_pictures_are_perfect():
    images = torch.rand(2, 3, 48, 48)
    assert psnr_each(images, images).tolist() == pytest.approx([120, 120])
    assert l1_each(images, images).tolist() == [0, 0]
    assert ssim_each(images, images).tolist() == pytest.approx([1, 1])
    assert ms_ssim_each(images, images, scales=3).tolist() == pytest.approx([1, 1])


def test_flat_pictures_differ_in_luminance_alone():
    x, y = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.6)
    luminance = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert ssim_each(x, y).item() == pytest.approx(luminance, rel=1e-5)


def test_psnr_and_ssim_are_those_of_scikit_image(pair):
    assert psnr_each(*pair).item() == pytest.approx(SKIMAGE["psnr"], rel=1e-10)
    assert ssim_each(*pair).item() == pytest.approx(SKIMAGE["ssim"], rel=1e-7)


def test_torchmetrics_agrees_away_from_the_border(pair):
    worse, original = torch.cat([pair[0], pair[1]]), torch.cat([pair[1], pair[0].flip(-1)])
    psnr = peak_signal_noise_ratio(worse, original, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr_each(worse, original), psnr, rtol=1e-6, atol=0)
    _, similarities = structural_similarity_index_measure(
        worse, original, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = similarities[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(ssim_each(worse, original), inside, rtol=1e-6, atol=0)


def windows(picture: np.ndarray) -> np.ndarray:
    """Gaussian means of one channel, window by window."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2
    return np.einsum("ijkl,kl->ij", np.lib.stride_tricks.sliding_window_view(picture, (11, 11)), weights)


def ms_ssim_by_hand(x: np.ndarray, y: np.ndarray, weights: list[float]) -> float:
    """MS-SSIM of one channel, straight from the paper."""
    value = 1.0
    for scale, weight in enumerate(weights):
        mx, my = windows(x), windows(y)
        vx, vy, cov = windows(x * x) - mx * mx, windows(y * y) - my * my, windows(x * y) - mx * my
        structure = (2 * cov + 9e-4) / (vx + vy + 9e-4)
        luminance = (2 * mx * my + 1e-4) / (mx * mx + my * my + 1e-4)
        last = scale == len(weights) - 1
        value *= float((luminance * structure if last else structure).mean()) ** weight
        height, width = x.shape
        x, y = (p.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)) for p in (x, y))
    return value


@pytest.mark.parametrize("scales", [1, 2])
def test_ms_ssim_is_that_of_the_paper(pair, scales):
    worse, original = (p[0].numpy() for p in pair)
    weights = [w / sum(SCALES[:scales]) for w in SCALES[:scales]]
    by_hand = np.mean([ms_ssim_by_hand(worse[c], original[c], weights) for c in range(3)])
    assert ms_ssim_each(*pair, scales=scales).item() == pytest.approx(by_hand, rel=1e-9)


def test_ms_ssim_of_five_scales_is_near_that_of_torchmetrics(generator):
    """Which counts a mirrored border, and joins the channels before the product."""
    original = torch.rand(1, 1, 23, 23, generator=generator)
    original = torch.nn.functional.interpolate(original, (184, 184), mode="bicubic").clamp(0, 1)
    worse = (original + 0.05 * torch.randn(original.shape, generator=generator)).clamp(0, 1)
    theirs = multiscale_structural_similarity_index_measure(worse, original, data_range=1.0).item()
    ours = ms_ssim_each(worse, original).item()
    assert ours == pytest.approx(theirs, abs=0.01)
    assert ours < 0.99


def test_small_pictures_have_room_for_fewer_scales():
    assert [ms_ssim_scales(size) for size in (11, 21, 22, 32, 44, 64, 88, 128, 176, 256)] == [
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
    ]
    images = torch.rand(1, 3, 32, 32)
    ms_ssim_each(images, images, scales=2)
    with pytest.raises(ValueError, match="room for 2"):
        ms_ssim_each(images, images, scales=3)


def test_each_picture_has_its_own_number(pair):
    worse, original = torch.cat([pair[0], pair[1]]), torch.cat([pair[1], pair[1]])
    for metric in (psnr_each, ssim_each, lambda x, y: ms_ssim_each(x, y, scales=2)):
        together = metric(worse, original)
        assert together[0].item() == pytest.approx(metric(*pair).item())
        assert together[1] > together[0]


@pytest.mark.parametrize("metric", [psnr_each, l1_each, ssim_each])
def test_what_cannot_be_compared_is_refused(metric):
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match="resize one"):
        metric(images, torch.rand(2, 3, 8, 8))
    broken = images.clone()
    broken[1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 of 2 samples.*number 1; .*fp32"):
        metric(broken, images)


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim_each(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
