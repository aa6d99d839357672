"""Shapes, ranges and exactness of the VQGAN; parity with the reference: tests/checkpoints/importers/test_taming.py."""

import pytest
import torch
from torch.nn import functional as F

import dalle_pytorch
from dalle_pytorch.models import image_tokenizer
from dalle_pytorch.models import vqgan as module
from dalle_pytorch.models.image_tokenizer import Relaxation
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig
from dalle_pytorch.models.vqgan_layers import QUANTIZERS, Up


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


@pytest.mark.parametrize("quantizer", ["vq", "gumbel"])
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
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
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
        torch.testing.assert_close(vqgan.decode_grid(grid), with_gradient, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(module, "in_fast_layout", lambda x: x.contiguous())
        torch.testing.assert_close(vqgan.decode_grid(grid), with_gradient, rtol=1e-4, atol=1e-4)


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
        ({"ch": 48}, r"ch \(48\) .* multiple of norm_groups"),
        ({"ch": 16, "ch_mult": [2, 4]}, r"ch must be a multiple of norm_groups \(32\), got 16"),
        ({"ch_mult": []}, "ch_mult"),
        ({"attention_levels": [2]}, r"attention_levels \(\[2\]\) must be levels of ch_mult, 0 to 1"),
        ({"quantizer": "rvq"}, "quantizer must be one of vq, gumbel, ema, fsq, ibq, lfq, bsq, got 'rvq'"),
        ({"pixel_range": "bytes"}, "pixel_range must be one of minus_one_to_one, zero_to_one, got 'bytes'"),
        ({"quantizer": "gumbel", "normalize_codes": True}, "normalize_codes needs quantizer 'vq', got 'gumbel'"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


SETTINGS = {"fsq": {"levels": [8, 3]}, "lfq": {"codebook_size": 32}, "bsq": {"codebook_size": 32}}


def trainable(quantizer, **settings):
    """Small and with fresh weights."""
    sizes = {"image_size": 16, "ch": 16, "ch_mult": [1, 1], "num_res_blocks": 1, "attention_levels": []}
    codes = {"norm_groups": 2, "z_channels": 8, "embed_dim": 6, "codebook_size": 24, "quantizer": quantizer}
    return VQGAN(VQGANConfig(**{**sizes, **codes, **SETTINGS.get(quantizer, {}), **settings}))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_training_sees_the_codes_of_encode_and_the_images_of_decode(quantizer):
    vqgan, images = trainable(quantizer).eval(), torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        found = vqgan.reconstruct(images)
    assert torch.equal(vqgan.encode(images), found.image_tokens)
    if quantizer != "gumbel":  # whose noise chooses another code
        decoded = vqgan.decode(found.image_tokens)
        torch.testing.assert_close(vqgan.to_pixels(found.output), decoded, rtol=1e-3, atol=1e-4)
    assert found.output.shape == images.shape
    assert found.codes_loss.shape == ()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_codebook_works_in_other_precisions(quantizer, dtype):
    vqgan, images = trainable(quantizer).eval().to(dtype), torch.rand(2, 3, 16, 16)
    assert vqgan.decode(vqgan.encode(images)).shape == images.shape


def test_a_grid_fills_the_size_of_the_codebook():
    assert VQGANConfig(quantizer="fsq", levels=[8, 5, 5, 5], codebook_size=0).codebook_size == 1000
    with pytest.raises(ValueError, match="set codebook_size=0"):
        VQGANConfig(quantizer="fsq", levels=[8, 5, 5, 5])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_parameter_of_a_training_gets_a_gradient(quantizer):
    vqgan, images = trainable(quantizer).train(), torch.rand(4, 3, 16, 16)
    found = vqgan.reconstruct(images, Relaxation(kl_weight=0.1, usage_weight=0.1))
    (vqgan.reconstruction_error(found.output, images) + found.codes_loss).backward()
    silent = [name for name, p in vqgan.named_parameters() if p.grad is None]
    assert not silent


@pytest.mark.parametrize(
    ("quantizer", "pixel_range"), [*((q, "minus_one_to_one") for q in QUANTIZERS), ("vq", "zero_to_one")]
)
def test_training_tells_quarters_of_colours_apart(quantizer, pixel_range, unchecked_shapes):
    torch.manual_seed(0)
    images = torch.rand(6, 3, 2, 2).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    vqgan = trainable(quantizer, pixel_range=pixel_range, likelihood="mse").train()
    optimiser = torch.optim.Adam(vqgan.parameters(), lr=1e-3)
    for step in range(120):
        optimiser.zero_grad()
        found = vqgan.reconstruct(images, Relaxation(gumbel_tau=max(0.1, 1 - step / 100)))
        (vqgan.reconstruction_error(found.output, images) + found.codes_loss).backward()
        torch.nn.utils.clip_grad_norm_(vqgan.parameters(), 1.0)
        optimiser.step()
    vqgan.eval()
    error = (vqgan.decode(vqgan.encode(images)) - images).square().mean()
    assert error < 0.4 * (images.mean(dim=0) - images).square().mean()


def test_a_compiled_level_has_the_gradients_of_a_plain_one(unchecked_shapes):
    """Inductor of torch 2.13 loses those of nearest upsampling in bfloat16, in a network as large as this."""
    level = Up(VQGANConfig(ch=32, norm_groups=8, num_res_blocks=1, attention_levels=[]), 1, 128, 64)
    x, gradients = torch.randn(4, 128, 32, 32), []
    for run in (level, torch.compile(level)):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = run(given).float()
        (gradient,) = torch.autograd.grad((found * torch.linspace(0, 1, found.numel()).view_as(found)).sum(), given)
        gradients.append(gradient)
    assert gradients[0].norm() > 0
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


def test_codes_of_length_one_are_learnt_at_length_one():
    """As LlamaGen's: the loss compares unit vectors, whatever the latents' length."""
    vqgan, images = trainable("vq", normalize_codes=True).train(), torch.rand(2, 3, 16, 16)
    loss = vqgan.reconstruct(images).codes_loss
    with torch.no_grad():
        vqgan.quant_conv.weight *= 7
        vqgan.quant_conv.bias *= 7
        vqgan.codebook.weight *= 3
    torch.testing.assert_close(vqgan.reconstruct(images).codes_loss, loss)


def test_a_trained_one_comes_back(tmp_path):
    for quantizer in QUANTIZERS:
        vqgan, images = trainable(quantizer), torch.rand(2, 3, 16, 16)
        vqgan.train().reconstruct(images)
        dalle_pytorch.save(vqgan.eval(), tmp_path / f"{quantizer}.safetensors")
        loaded = dalle_pytorch.load(tmp_path / f"{quantizer}.safetensors", kind="vae")
        assert torch.equal(loaded.encode(images), vqgan.encode(images))
