"""Loss, scores, masks and learning of the CLIP."""

import math

import pytest
import torch

from dalle_pytorch import CLIP, CLIPConfig
from dalle_pytorch.models.clip import contrastive_loss

TEXT = torch.tensor([[3, 1, 4, 0, 0], [1, 5, 0, 0, 0], [2, 2, 2, 2, 2]])


def test_loss_of_perfect_and_of_equal_features():
    unit = torch.eye(4)
    scale = torch.tensor(100.0)
    assert contrastive_loss(unit, unit, scale, None).loss < 1e-6
    same = torch.ones(4, 4) / 2
    torch.testing.assert_close(contrastive_loss(same, same, scale, None).loss, torch.tensor(math.log(4)))
    # SigLIP with scale 0 and bias 0: every one of the 16 pairs costs ln 2, divided by the batch of 4
    zero = torch.tensor(0.0)
    torch.testing.assert_close(contrastive_loss(unit, unit, zero, zero).loss, torch.tensor(4 * math.log(2)))


def test_a_wrong_caption_is_one_more_to_choose_among_for_its_picture():
    unit, scale = torch.eye(4), torch.tensor(2.0)
    plain = contrastive_loss(unit, unit, scale, None)
    torch.testing.assert_close(contrastive_loss(unit, unit, scale, None, torch.zeros(4, 1, 4)).loss, plain.loss)
    # a wrong caption as good as the right one, for the first picture only: exp(2) once more in one of four softmaxes
    wrong = torch.zeros(4, 2, 4)
    wrong[0, 1, 0] = 1
    total = math.exp(2) + 3
    more = math.log((total + math.exp(2)) / total) / 4 / 2
    torch.testing.assert_close(contrastive_loss(unit, unit, scale, None, wrong).loss, plain.loss + more)
    bias = torch.tensor(-1.0)  # SigLIP: one pair more
    siglip = contrastive_loss(unit, unit, scale, bias).loss
    expected = siglip + math.log(1 + math.exp(2 - 1)) / 4
    torch.testing.assert_close(contrastive_loss(unit, unit, scale, bias, wrong).loss, expected)


def test_scale_starts_as_the_papers_and_is_clamped(tiny_clip):
    assert tiny_clip.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        tiny_clip.log_logit_scale.fill_(50.0)
    assert tiny_clip.logit_scale.item() == pytest.approx(100, rel=1e-5)
    tiny_clip.logit_scale.backward()
    assert tiny_clip.log_logit_scale.grad > 0  # a plain clamp would hold it there for ever


def test_a_scale_that_was_pushed_for_long_comes_back_at_once(tiny_clip):
    optimizer = torch.optim.AdamW([tiny_clip.log_logit_scale], lr=1e-2, betas=(0.0, 0.95), weight_decay=0.0)

    def step(direction):
        optimizer.zero_grad()
        (-direction * tiny_clip.logit_scale).backward()
        optimizer.step()
        tiny_clip.clamp_logit_scale()

    for _ in range(400):
        step(1)
    assert tiny_clip.log_logit_scale.item() == pytest.approx(math.log(100))
    step(-1)
    assert tiny_clip.logit_scale < 99.9


def test_scores_are_not_rounded_under_autocast():
    features = torch.nn.functional.normalize(torch.randn(64, 16), dim=-1)
    noisy = torch.nn.functional.normalize(features + 0.01 * torch.randn(64, 16), dim=-1)
    exact = contrastive_loss(features, noisy, torch.tensor(100.0), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert contrastive_loss(features, noisy, torch.tensor(100.0), None).loss == exact.loss


def test_scores_are_cosines_and_pairs_agree_with_the_matrix(tiny_clip):
    images = torch.rand(2, 3, 16, 16)
    scores = tiny_clip.scores(TEXT, images)
    assert scores.shape == (3, 2)
    assert scores.abs().max() <= 1 + 1e-6
    pairs = tiny_clip(TEXT[:2], images)
    torch.testing.assert_close(pairs, tiny_clip.logit_scale * scores[:2].diagonal())


def test_padding_and_mask_are_not_read(tiny_clip):
    short = tiny_clip.encode_text(TEXT[:1, :3])
    torch.testing.assert_close(tiny_clip.encode_text(TEXT[:1]), short)
    mask = torch.tensor([[True, True, False, False, False]])
    torch.testing.assert_close(tiny_clip.encode_text(TEXT[2:], mask), tiny_clip.encode_text(TEXT[2:, :2]))
    empty = tiny_clip.encode_text(torch.zeros(1, 5, dtype=torch.long))
    assert empty.isfinite().all()


def test_pictures_of_another_size_are_resized(tiny_clip):
    small = torch.rand(1, 3, 4, 4)
    large = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert tiny_clip.encode_image(large).shape == (1, 8)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_one_batch_overfits(loss):
    config = CLIPConfig(
        dim_text=32, dim_image=32, dim_latent=16, text_vocab_size=9, text_len=5, text_enc_depth=1, text_heads=2,
        visual_enc_depth=1, visual_heads=2, image_size=16, patch_size=4, loss=loss,
    )  # fmt: skip
    clip, images = CLIP(config), torch.rand(3, 3, 16, 16)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        result = clip.loss(TEXT, images)
        result.loss.backward()
        optimizer.step()
    assert result.text_to_image_accuracy == result.image_to_text_accuracy == 1
    assert torch.equal(clip.eval().scores(TEXT, images).argmax(dim=1), torch.arange(3))


def test_misfits_are_named(tiny_clip):
    with pytest.raises(ValueError, match="infonce, siglip"):
        CLIPConfig(loss="hinge")
    with pytest.raises(ValueError, match=r"image_size \(30\).*patch_size \(8\)"):
        CLIPConfig(image_size=30, patch_size=8)
    with pytest.raises(ValueError, match="6 text tokens"):
        tiny_clip.encode_text(torch.ones(1, 6, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[9, 9\].*0 to 8"):
        tiny_clip.encode_text(torch.full((1, 2), 9))
    with pytest.raises(ValueError, match=r"text_mask of shape \(1, 2\)"):
        tiny_clip.encode_text(TEXT[:1], torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="patch_size must be at least 1"):
        CLIPConfig(patch_size=0)
    with pytest.raises(ValueError, match="1 channels"):
        tiny_clip.encode_image(torch.rand(1, 1, 16, 16))
