"""JPEG and WebP within a budget of bytes."""

import pytest
import torch

from dalle_pytorch.evaluation.codecs import at_bytes
from dalle_pytorch.evaluation.reconstruction import psnr_each


@pytest.fixture
def images(classical):
    """Two smooth pictures."""
    original, _ = classical.pictures()
    picture = torch.from_numpy(original).float().permute(2, 0, 1)[:, :40]
    return torch.stack([picture, picture.flip(-1)])


@pytest.mark.parametrize("codec", ["JPEG", "WEBP"])
def test_files_keep_to_the_budget_and_use_it(images, codec):
    errors = []
    for budget in (400, 700):
        coded = at_bytes(images, codec, budget)
        assert coded.images.shape == images.shape
        assert (coded.file_bytes <= budget).all()
        errors.append(psnr_each(coded.images, images).mean().item())
    assert errors[0] < errors[1]
    assert errors[0] > 20


def test_where_no_file_is_so_small_the_smallest_is_taken(images):
    coded = at_bytes(images, "JPEG", 10)
    assert (coded.file_bytes > 10).all()
    assert (coded.file_bytes < 900).all()
    assert torch.isfinite(coded.images).all()


def test_each_picture_has_its_own_file(images):
    torch.testing.assert_close(at_bytes(images, "WEBP", 300)[0][1:], at_bytes(images[1:], "WEBP", 300)[0])


def test_unknown_codecs_are_refused(images):
    with pytest.raises(ValueError, match="JPEG, WEBP"):
        at_bytes(images, "GIF", 100)
