"""An image tokenizer's numbers: those of its parts, repeatable, whatever the batch."""

import pytest
import torch

from dalle_pytorch.evaluation import image_tokenizer as module
from dalle_pytorch.evaluation.features import clip_extractor
from dalle_pytorch.evaluation.image_tokenizer import evaluate_image_tokenizer, reconstruct
from dalle_pytorch.evaluation.measure import Measure
from dalle_pytorch.evaluation.page import Gallery, Table
from dalle_pytorch.evaluation.reconstruction import psnr_each
from dalle_pytorch.models.lpips import LPIPS

MEASURE = Measure({"split": "val"}, rounds=50, halves=10)


@pytest.fixture
def images():
    return torch.rand(20, 3, 16, 16)


def test_numbers_of_a_tokenizer(tiny_vae, tiny_clip, images):
    torch.manual_seed(1)
    lpips = LPIPS()
    metrics, sections = evaluate_image_tokenizer(
        tiny_vae, images, MEASURE, lpips=[lpips], extractors=[clip_extractor(tiny_clip)]
    )
    with torch.no_grad():
        tokens = tiny_vae.encode(images)
        expected = psnr_each(tiny_vae.decode(tokens), images)
    assert metrics["psnr"].value == pytest.approx(expected.mean().item(), rel=1e-5)
    assert metrics["psnr"].interval[0] < metrics["psnr"].value < metrics["psnr"].interval[1]
    assert metrics["codebook_used"].value == tokens.unique().numel()
    assert metrics["codebook_used"].value + metrics["codebook_dead"].value == 12
    assert {"l1", "ssim", "lpips_vgg", "rfid_clip", "rkid_clip", "rcmmd"} <= set(metrics)
    assert {"reconstruction_precision_clip", "reconstruction_recall_clip"} <= set(metrics)
    assert "rfid" not in metrics  # the plain name is Inception's
    assert metrics["rfid_clip"].weights_sha256 == clip_extractor(tiny_clip).weights_sha256
    assert metrics["jpeg_bytes"].value > metrics["jpeg_bytes"].protocol["budget"]  # 16 tokens of log2(12) bits: 7 bytes
    assert {"jpeg_psnr", "webp_ssim"} <= set(metrics)
    assert all(metric.protocol["split"] == "val" for metric in metrics.values())
    assert [type(section) for section in sections] == [Gallery, Gallery, Table]


def test_numbers_are_repeatable_and_do_not_depend_on_the_batch(tiny_vae, images, monkeypatch):
    first, _ = evaluate_image_tokenizer(tiny_vae, images, MEASURE, codecs=())
    again, _ = evaluate_image_tokenizer(tiny_vae, images, MEASURE, codecs=())
    assert first == again
    monkeypatch.setattr(module, "TOGETHER", 3)
    tokens, decoded = reconstruct(tiny_vae, images)
    monkeypatch.setattr(module, "TOGETHER", 20)
    together, both = reconstruct(tiny_vae, images)
    assert torch.equal(tokens, together)
    torch.testing.assert_close(decoded, both)


def test_small_pictures_leave_out_what_they_have_no_room_for(tiny_vae, images):
    metrics, _ = evaluate_image_tokenizer(tiny_vae, images, MEASURE, codecs=())
    assert not [name for name in metrics if name.startswith(("ms_ssim", "jpeg", "webp", "rfid"))]


def test_pictures_of_another_size_are_refused(tiny_vae):
    with pytest.raises(ValueError, match="resize them"):
        evaluate_image_tokenizer(tiny_vae, torch.rand(4, 3, 32, 32), MEASURE)
