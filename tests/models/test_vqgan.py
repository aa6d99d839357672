"""Shapes, ranges and exactness of the VQGAN; parity with the reference: tests/checkpoints/importers/test_taming.py."""

import pytest
import torch
from torch.nn import functional as F

from dalle_pytorch.models import image_tokenizer
from dalle_pytorch.models import vqgan as module
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
from dalle_pytorch.models.vqgan_layers import QUANTIZERS


def make(**settings) -> VQGAN:
    """8 x 8 tokens of 24 codes over 16 x 16 pictures; codes as wide apart as the latents."""
    defaults = {"image_size": 16, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attention_levels": [1]}
    sizes = {"z_channels": 8, "embed_dim": 6, "codebook_size": 24}
    vqgan = VQGAN(VQGANConfig(**{**defaults, **sizes, **settings})).eval()
    with torch.no_grad():
        vqgan.codebook.weight *= 0.3
        vqgan.decoder.conv_out.weight *= 5
    return vqgan


def as_picture(pixels):
    """From the model's range."""
    return ((pixels + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(
    ("image_size", "ch_mult", "levels", "channels"),
    [
        (16, [1, 2], [1], 3),
        (20, [2, 1], [0, 1], 1),
        (24, [1, 1, 3], [], 4),
        (7, [1], [0], 2),
        (56, [1, 1, 1, 2], [2], 3),
    ],
)
def test_any_size_that_the_halvings_divide(quantizer, image_size, ch_mult, levels, channels):
    vqgan = make(
        image_size=image_size, ch_mult=ch_mult, attention_levels=levels, channels=channels, quantizer=quantizer
    )
    images = torch.rand(2, channels, image_size, image_size)
    tokens = vqgan.encode(images)
    decoded = vqgan.decode(tokens)
    assert vqgan.grid_size * 2 ** (len(ch_mult) - 1) == image_size
    assert tokens.shape == (2, vqgan.grid_size**2)
    assert len(tokens.unique()) > 1
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert 0 <= decoded.min() < decoded.max() <= 1


def test_large_batches_are_worked_through_in_parts(monkeypatch):
    """As many pictures at a time as there is room for, one at least; grids too; ids are looked at once."""
    vqgan, images, tokens = make(), torch.rand(5, 3, 16, 16), torch.randint(8, (5, 64))
    grids, seen, checks = tokens.view(5, 8, 8), [], []
    expected = vqgan.encode(images), vqgan.decode(tokens), vqgan.decode_grid(grids)
    vqgan.encoder.register_forward_hook(lambda net, inputs, out: seen.append(len(inputs[0])))
    vqgan.decoder.register_forward_hook(lambda net, inputs, out: seen.append(len(inputs[0])))
    for pixels, parts in ((2 * 16**2, [2, 2, 1]), (100, [1] * 5)):
        monkeypatch.setattr(module, "PIXELS", pixels)
        for got, want in zip(
            (vqgan.encode(images), vqgan.decode(tokens), vqgan.decode_grid(grids)), expected, strict=True
        ):
            torch.testing.assert_close(got, want)
            assert seen[: len(parts)] == parts
            del seen[: len(parts)]
    check = image_tokenizer.check_ids
    for place in (module, image_tokenizer):
        monkeypatch.setattr(place, "check_ids", lambda *ids: checks.append(ids) or check(*ids))
    vqgan.decode(tokens)
    assert len(checks) == 1


def test_codes_do_not_depend_on_the_batch():
    for settings in ({}, {"quantizer": "gumbel"}, {"normalize_codes": True}):
        vqgan = make(**settings)
        images = torch.rand(5, 3, 16, 16)
        alone = torch.cat([vqgan.encode(image[None]) for image in images])
        assert torch.equal(vqgan.encode(images), alone)
        assert torch.equal(vqgan.encode(images.flip(0)).flip(0), alone)


@pytest.mark.parametrize("normalize", [False, True])
def test_codes_are_the_nearest_in_any_portion(normalize, monkeypatch):
    vqgan = make(normalize_codes=normalize)
    latents, codes = torch.randn(50, 6), vqgan.codebook.weight.detach()
    if normalize:
        distances = torch.cdist(F.normalize(latents, dim=1), F.normalize(codes, dim=1))
    else:
        distances = torch.cdist(latents, codes)
    for most in (2**25, 24 * 7, 1):
        monkeypatch.setattr(module, "MAX_SCORES", most)
        with torch.no_grad():
            assert torch.equal(vqgan.nearest(latents), distances.argmin(dim=1))


def test_codes_are_the_same_under_autocast():
    vqgan = make()
    images = torch.rand(4, 3, 16, 16)
    tokens = vqgan.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vqgan.encode(images), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    for settings in ({}, {"quantizer": "gumbel"}, {"normalize_codes": True}):
        vqgan = make(**settings)
        images = torch.rand(4, 3, 16, 16)
        tokens = vqgan.encode(images)
        with torch.no_grad():
            full = vqgan.decode(tokens)
            vqgan.to(dtype)
            half = vqgan.decode(tokens)
        assert half.dtype == torch.float32
        assert 0 < (half - full).abs().mean() < 0.02
        assert (vqgan.encode(images) == tokens).float().mean() > 0.9


def test_a_rectangle_of_tokens_decodes_as_one_picture():
    vqgan = make()
    grid = torch.randint(24, (2, 8, 8))
    with torch.no_grad():
        assert torch.equal(vqgan.decode_grid(grid), vqgan.decode(grid.flatten(1)))
        wide = vqgan.decode_grid(torch.randint(24, (1, 3, 11)))
    assert wide.shape == (1, 3, 6, 22)


def test_layout_in_memory_and_gradients_do_not_change_pixels(monkeypatch):
    vqgan = make()
    grid = torch.randint(24, (2, 8, 8))
    with_gradient = vqgan.decode_grid(grid)
    with torch.no_grad():
        torch.testing.assert_close(vqgan.decode_grid(grid), with_gradient)
        monkeypatch.setattr(module, "in_fast_layout", lambda x: x.contiguous())
        torch.testing.assert_close(vqgan.decode_grid(grid), with_gradient)


def test_every_weight_gets_its_gradient():
    """Work in place must not spoil what the backward pass needs: the gradient is the slope."""
    vqgan = make().double()
    grid, weight = torch.randint(24, (1, 4, 4)), vqgan.decoder.mid.block_1.norm1.weight
    codes = vqgan.codebook(grid).movedim(-1, 1)
    vqgan.decoder(vqgan.post_quant_conv(codes)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in vqgan.decoder.parameters())
    direction = torch.randn_like(weight)
    values = []
    with torch.no_grad():
        for step in (1e-5, -1e-5):
            weight += step * direction
            values.append(vqgan.decoder(vqgan.post_quant_conv(codes)).square().sum())
            weight -= step * direction
    torch.testing.assert_close((values[0] - values[1]) / 2e-5, (weight.grad * direction).sum(), rtol=1e-5, atol=1e-6)


def test_inputs_are_left_alone():
    vqgan = make(ch_mult=[1], attention_levels=[0], pixel_range="zero_to_one")
    images, grid = torch.rand(1, 3, 16, 16), torch.randint(24, (1, 8, 8))
    before = images.clone(), grid.clone(), vqgan.codebook.weight.clone()
    vqgan.encode(images)
    with torch.no_grad():
        vqgan.decode_grid(grid)
    assert all(torch.equal(a, b) for a, b in zip(before, (images, grid, vqgan.codebook.weight), strict=True))


def test_range_of_pixels():
    """The same weights see and give other pixels, in the range that they were trained on."""
    vqgan, grid = make(), torch.randint(24, (1, 8, 8))
    images = torch.rand(2, 3, 16, 16)
    tokens = vqgan.encode(images)
    with torch.no_grad():
        decoded = vqgan.decode_grid(grid)
        vqgan.config.pixel_range = "zero_to_one"
        assert torch.equal(as_picture(vqgan.decode_grid(grid)), decoded.clamp(min=0.5))
    assert not torch.equal(vqgan.encode(images), tokens)


def test_a_decoder_alone_has_no_other_weights():
    whole, decoder = make(quantizer="gumbel"), make(quantizer="gumbel", encoder=False)
    parts = {name.split(".")[0] for name in decoder.state_dict()}
    assert parts == {"codebook", "post_quant_conv", "decoder"}
    decoder.load_state_dict({name: whole.state_dict()[name] for name in decoder.state_dict()})
    tokens = torch.randint(24, (2, 64))
    with torch.no_grad():
        assert torch.equal(decoder.decode(tokens), whole.decode(tokens))
    with pytest.raises(ValueError, match="only a decoder"):
        decoder.encode(torch.rand(2, 3, 16, 16))


def test_other_pictures_and_tokens_are_refused():
    vqgan = make()
    with pytest.raises(ValueError, match=r"\(3, 16, 20\) given .* \(3, 16, 16\)"):
        vqgan.encode(torch.rand(1, 3, 16, 20))
    with pytest.raises(ValueError, match=r"\(1, 16, 16\) given"):
        vqgan.encode(torch.rand(1, 1, 16, 16))
    with pytest.raises(ValueError, match="63 image tokens given"):
        vqgan.decode(torch.zeros(1, 63, dtype=torch.long))
    for wrong in (-1, 24):
        with pytest.raises(ValueError, match=rf"span .*{wrong}.* 0 to 23"):
            vqgan.decode(torch.full((1, 64), wrong))
        with pytest.raises(ValueError, match=rf"span .*{wrong}.* 0 to 23"):
            vqgan.decode_grid(torch.full((1, 2, 3), wrong))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 24, "ch_mult": [1, 1, 1, 1, 1]}, r"image_size \(24\) must be a multiple of 16"),
        ({"ch": 48}, r"ch \(48\) .* multiple of 32"),
        ({"ch": 16, "ch_mult": [2, 4]}, "ch must be a multiple of 32, got 16"),
        ({"ch_mult": []}, "ch_mult"),
        ({"attention_levels": [2]}, r"attention_levels \(\[2\]\) must be levels of ch_mult, 0 to 1"),
        ({"quantizer": "fsq"}, "quantizer must be one of vq, gumbel, got 'fsq'"),
        ({"pixel_range": "bytes"}, "pixel_range must be one of minus_one_to_one, zero_to_one, got 'bytes'"),
        ({"quantizer": "gumbel", "normalize_codes": True}, "normalize_codes needs quantizer 'vq', got 'gumbel'"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
