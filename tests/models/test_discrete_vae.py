"""Reduction, range and learning of the DiscreteVAE."""

import math

import pytest
import torch
from torch.nn import functional as F

from dalle_pytorch import DiscreteVAE, DiscreteVAEConfig
from dalle_pytorch.models import discrete_vae
from dalle_pytorch.models.conv_tokenizer import LIKELIHOODS, logit_laplace_nll
from dalle_pytorch.models.quantizers import gumbel_softmax


def make(**settings) -> DiscreteVAE:
    defaults = {"image_size": 16, "num_layers": 2, "codebook_size": 12, "codebook_dim": 8, "hidden_dim": 16}
    return DiscreteVAE(DiscreteVAEConfig(**{**defaults, **settings}))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_loss_and_kl_do_not_depend_on_the_batch_size(likelihood, monkeypatch):
    """Copies of a picture cost what one costs (without Gumbel noise, which differs from row to row)."""
    vae = make(likelihood=likelihood)
    monkeypatch.setattr(discrete_vae, "gumbel_softmax", lambda logits, tau, *_, **__: (logits / tau).softmax(1))
    image = torch.rand(1, 3, 16, 16)
    one = vae.loss(image, gumbel_tau=1.0, kl_weight=6.6)
    many = vae.loss(image.repeat(7, 1, 1, 1), gumbel_tau=1.0, kl_weight=6.6)
    for part in ("loss", "reconstruction", "kl"):
        torch.testing.assert_close(getattr(many, part), getattr(one, part))
    torch.testing.assert_close(one.loss, one.reconstruction + 6.6 * one.kl)


@pytest.mark.parametrize("image_size", [8, 16])
def test_kl_is_that_of_the_codes_per_subpixel(image_size):
    """One code for sure costs ln K a token; tokens over subpixels is the same at every picture size."""
    vae = make(image_size=image_size)
    with torch.no_grad():
        vae.encoder[-1].weight.zero_()
        vae.encoder[-1].bias.copy_(100.0 * F.one_hot(torch.tensor(3), 12))
    result = vae.loss(torch.rand(2, 3, image_size, image_size), gumbel_tau=1.0, kl_weight=0.0)
    torch.testing.assert_close(result.kl, torch.tensor(math.log(12) / (3 * 4**2)))
    assert (result.image_tokens == 3).all()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("size", [(16, 2), (24, 3), (96, 2)])
def test_decode_of_encode_stays_in_range(likelihood, size):
    vae = make(likelihood=likelihood, image_size=size[0], num_layers=size[1]).eval()
    with torch.no_grad():
        vae.decoder[-1].weight *= 50  # far outside the range before it is clamped
    images = torch.rand(2, 3, size[0], size[0])
    tokens = vae.encode(images)
    decoded = vae.decode(tokens)
    assert tokens.shape == (2, vae.num_image_tokens)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert decoded.std() > 0


def test_logit_laplace_integrates_to_one():
    """Over pixel values: the density in x, times dx/dpixel = 1 - 2 eps, plus the tails outside the pixel range."""
    mu, log_b = torch.tensor(0.3), torch.tensor(-1.0)
    pixels = torch.linspace(0, 1, 4001).view(-1, 1, 1, 1)
    output = torch.stack([mu, log_b]).view(1, 2, 1, 1)
    nll = torch.stack([logit_laplace_nll(output, pixel[None]) for pixel in pixels])
    inside = torch.trapezoid((-nll).exp() * 0.8, pixels.flatten())
    distribution = torch.distributions.Laplace(mu, log_b.exp())
    low, high = torch.logit(torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(inside, distribution.cdf(high) - distribution.cdf(low), atol=1e-4, rtol=1e-4)


def test_a_logit_laplace_scale_beyond_its_bound_can_come_back():
    """At ln b = -6 a location that is off wants a wider scale; one that is exact may not go further out."""
    image = torch.full((1, 1, 1, 1), 0.5)  # its logit is 0
    for mu, leads_back in ((1.0, True), (0.0, False)):
        output = torch.tensor([mu, -6.0]).view(1, 2, 1, 1).requires_grad_()
        nll = logit_laplace_nll(output, image)
        clamped = logit_laplace_nll(torch.tensor([mu, -5.0]).view(1, 2, 1, 1), image)
        torch.testing.assert_close(nll, clamped)
        nll.backward()
        assert (output.grad[0, 1].item() < -100) == leads_back
        assert (output.grad[0, 1].item() == 0) != leads_back
    inside = torch.tensor([0.7, -2.0]).view(1, 2, 1, 1).requires_grad_()
    logit_laplace_nll(inside, image).backward()
    assert inside.grad[0, 1].item() == pytest.approx(1 - 0.7 * math.exp(2), rel=1e-5)


def test_straight_through_codes_are_one_hot_with_gradient():
    for settings in ({"straight_through": True}, {"straight_through": True, "reinmax": True}):
        logits = torch.randn(2, 12, 4, 4, requires_grad=True)
        codes = gumbel_softmax(logits, 0.5, torch.Generator().manual_seed(0), **settings)
        torch.testing.assert_close(codes.sort(dim=1).values[:, -1], torch.ones(2, 4, 4))
        torch.testing.assert_close(codes.sum(dim=1), torch.ones(2, 4, 4))
        (codes * torch.randn_like(codes)).sum().backward()
        assert logits.grad.abs().sum() > 0


def test_noise_comes_from_the_generator_and_inputs_stay():
    vae = make()
    images = torch.rand(2, 3, 16, 16)
    before = images.clone()
    draws = [
        vae.loss(images, gumbel_tau=1.0, kl_weight=1.0, generator=torch.Generator().manual_seed(seed)).loss
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(images, before)


def test_one_batch_overfits():
    vae = make(hidden_dim=32)
    images = torch.rand(4, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        vae.loss(images, gumbel_tau=0.5, kl_weight=0.01).loss.backward()
        optimizer.step()
    error = F.mse_loss(vae.eval().decode(vae.encode(images)), images)
    assert error < 0.3 * F.mse_loss(images.mean(0, keepdim=True).expand_as(images), images)


def test_codes_do_not_depend_on_autocast():
    """Tokens that are cached, made in training or made in generation are the same."""
    vae = make().eval()
    images = torch.rand(8, 3, 16, 16)
    expected = vae.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(images), expected)


def test_usage_is_zero_for_even_and_log_k_for_single_codes(monkeypatch):
    vae = make()
    for logits, expected in ((torch.zeros(2, 12, 4, 4), 0.0), (torch.zeros(2, 12, 4, 4), math.log(12))):
        if expected:
            logits[:, 5] = 100.0
        monkeypatch.setattr(vae, "encode_logits", lambda images, logits=logits: logits)
        result = vae.loss(torch.rand(2, 3, 16, 16), gumbel_tau=1.0, kl_weight=0.0, usage_weight=2.0)
        torch.testing.assert_close(result.usage, torch.tensor(expected), atol=1e-5, rtol=0)
        torch.testing.assert_close(result.loss, result.reconstruction + 2 * result.usage)


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"image_size \(20\).*8"):
        make(image_size=20, num_layers=3)
    with pytest.raises(ValueError, match="mse, l1, smooth_l1, logit_laplace"):
        make(likelihood="l2")
    with pytest.raises(ValueError, match="straight_through"):
        make(reinmax=True)
    vae = make()
    with pytest.raises(ValueError, match="divide by 255"):
        vae.check_images(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1, 16, 16\).*\(3, 16, 16\)"):
        vae.encode(torch.rand(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"15 image tokens.*4 x 4"):
        vae.decode(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ValueError, match="ids 0 to 11"):
        vae.decode(torch.full((1, 16), 12))
