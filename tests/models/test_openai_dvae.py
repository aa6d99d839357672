"""OpenAI's dVAE: what it computes, whichever way it does, and whatever happens to its weights in between."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from dalle_pytorch import DALLE, DALLEConfig
from dalle_pytorch.models import openai_dvae
from dalle_pytorch.models.openai_dvae import Conv2d, OpenAIDVAE, OpenAIDVAEConfig, halve

ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
ROUNDING = 147 * torch.finfo(torch.float32).eps
"""Of pixels in [0, 1], and of logits relative to the largest: convolutions may add up the 7 x 7 x 3 values of their
widest window in any order; what the blocks add is small beside it."""


def make(**settings):
    """A small network whose biases count as well."""
    sizes = {"image_size": 16, "hidden_dim": 8, "init_dim": 12, "codebook_size": 24}
    vae = OpenAIDVAE(OpenAIDVAEConfig(**{**sizes, **settings})).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        vae.decoder.input.weight *= 4
    return vae


def make_data(vae, count=2):
    """Pictures and tokens."""
    size = vae.image_size
    return torch.rand(count, vae.channels, size, size), torch.randint(
        0, vae.codebook_size, (count, vae.num_image_tokens)
    )


def by_definition(x, groups, gain, change):
    """The groups of blocks as the paper's code spells them out; ``change`` of resolution between them."""
    for number, group in groups.items():
        x = x if number == "1" else change(x)
        for block in group.values():
            hidden = x
            for conv in (block.conv_1, block.conv_2, block.conv_3, block.conv_4):
                hidden = F.conv2d(hidden.relu(), conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
            identity = x if block.id_path is None else F.conv2d(x, block.id_path.weight, block.id_path.bias)
            x = identity + gain * hidden
    return x.relu()


def logits_by_definition(vae, images):
    encoder, gain = vae.encoder, 1 / (4 * vae.config.num_blocks) ** 2
    x = F.conv2d(0.8 * images + 0.1, encoder.input.weight, encoder.input.bias, padding=3)
    x = by_definition(x, encoder.groups, gain, lambda x: F.max_pool2d(x, 2))
    return F.conv2d(x, encoder.output.weight, encoder.output.bias)


def pixels_by_definition(vae, tokens):
    decoder, gain = vae.decoder, 1 / (4 * vae.config.num_blocks) ** 2
    one_hot = F.one_hot(tokens.view(-1, vae.grid_size, vae.grid_size), vae.codebook_size).permute(0, 3, 1, 2).float()
    x = F.conv2d(one_hot, decoder.input.weight.T[:, :, None, None], decoder.input.bias)
    x = by_definition(x, decoder.groups, gain, lambda x: F.interpolate(x, scale_factor=2, mode="nearest"))
    maps = F.conv2d(x, decoder.output.weight, decoder.output.bias)[:, : vae.channels]
    return ((torch.sigmoid(maps) - 0.1) / 0.8).clamp(0, 1)


@pytest.mark.parametrize("settings", [{}, {"image_size": 8}, {"image_size": 40, "num_blocks": 1}, {"num_blocks": 3},
                                      {"init_dim": 64}, {"hidden_dim": 4, "channels": 1}])  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
def test_computes_the_definition(settings, training):
    """Frozen (oneDNN's convolutions) and in training mode (torch's)."""
    vae = make(**settings).train(training)
    images, tokens = make_data(vae)
    with torch.no_grad():
        logits = vae.encode_logits(images)
        expected = logits_by_definition(vae, images)
        torch.testing.assert_close(logits, expected, atol=ROUNDING * float(expected.abs().max()), rtol=0)
        torch.testing.assert_close(vae.decode(tokens), pixels_by_definition(vae, tokens), atol=ROUNDING, rtol=0)
    assert torch.equal(vae.encode(images), logits.argmax(dim=1).flatten(1))
    assert logits.std() > 0.1
    assert vae.decode(tokens).std() > 0.02


@ONEDNN
def test_weights_are_laid_out_once_and_again_after_a_change():
    vae = make()
    images, tokens = make_data(vae)
    vae.encode(images), vae.decode(tokens)
    convs = [module for module in vae.modules() if isinstance(module, Conv2d)]
    first = [conv.packed for conv in convs]
    vae.encode(images.flip(0)), vae.decode(tokens.flip(0))
    assert all(conv.packed is packed is not None for conv, packed in zip(convs, first, strict=True))
    with torch.no_grad():
        vae.encoder.input.bias += 1
    vae.encode(images)
    assert [conv.packed is packed for conv, packed in zip(convs, first, strict=True)] == [
        conv is not vae.encoder.input for conv in convs
    ]


def change_in_place(vae, other):
    with torch.no_grad():
        for own, new in zip(vae.parameters(), other.parameters(), strict=True):
            own.copy_(new)


def replace(vae, other):
    for own, new in zip(vae.modules(), other.modules(), strict=True):
        own._parameters.update(new._parameters)


def move_and_round(vae, other):
    vae.load_state_dict(other.state_dict())
    images, tokens = make_data(vae)
    vae.encode(images), vae.decode(tokens)
    other.bfloat16().float()
    vae.bfloat16().float()


@pytest.mark.parametrize("change", [
    change_in_place,
    replace,
    move_and_round,
    lambda vae, other: vae.load_state_dict(other.state_dict()),
    lambda vae, other: vae.load_state_dict(other.state_dict(), assign=True),
], ids=["in place", "replaced", "rounded", "loaded", "assigned"])  # fmt: skip
def test_changed_weights_count(change):
    vae, other = make(), make()
    images, tokens = make_data(vae)
    for net in (vae, other):
        net.encode(images), net.decode(tokens)
    before = vae.decode(tokens)
    change(vae, other)
    with torch.no_grad():
        expected = logits_by_definition(other, images)
        atol = ROUNDING * float(expected.abs().max())
        torch.testing.assert_close(vae.encode_logits(images), expected, atol=atol, rtol=0)
    torch.testing.assert_close(vae.decode(tokens), pixels_by_definition(other, tokens), atol=ROUNDING, rtol=0)
    assert (vae.decode(tokens) - before).abs().max() > 1e-3


def test_copies_pickles_and_states_hold_the_weights_alone():
    vae = make()
    images, _ = make_data(vae)
    torch.save(vae, untouched := io.BytesIO())
    pixels = vae.decode(vae.encode(images))
    torch.save(vae, used := io.BytesIO())
    assert len(used.getvalue()) == len(untouched.getvalue())
    used.seek(0)
    for same in (copy.deepcopy(vae), torch.load(used, weights_only=False)):
        assert all(module.packed is None for module in same.modules() if isinstance(module, Conv2d))
        assert torch.equal(same.decode(same.encode(images)), pixels)
    assert set(vae.state_dict()) == {name for name, _ in vae.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_16_bit_weights_give_nearly_the_same(dtype, training):
    vae = make(image_size=40, hidden_dim=16)
    images, tokens = make_data(vae)
    logits, pixels = logits_by_definition(vae, images), vae.decode(tokens)
    vae = vae.to(dtype).train(training)
    chosen = logits.flatten(2).gather(1, vae.encode(images)[:, None])[:, 0]
    best = logits.flatten(2).amax(dim=1)
    assert (best - chosen).max() < 0.02 * logits.abs().max()
    decoded = vae.decode(tokens)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, pixels, atol=0.02, rtol=0)
    assert torch.equal(vae.encode(images.to(dtype).float()), vae.encode(images.to(dtype)))


@pytest.mark.parametrize("training", [False, True])
def test_autocast_changes_nothing(training):
    vae = make().train(training)
    images, tokens = make_data(vae, count=100)  # some of 400 codes would change
    codes, pixels = vae.encode(images), vae.decode(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vae.encode(images), codes)
        assert torch.equal(vae.decode(tokens), pixels)


def test_a_large_batch_in_parts_is_the_same(monkeypatch):
    vae = make()
    images, tokens = make_data(vae, count=5)
    codes, pixels, seen = vae.encode(images), vae.decode(tokens), []
    monkeypatch.setattr(openai_dvae, "PIXELS", 2 * 16 * 16 + 5)
    vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert torch.equal(vae.encode(images), codes)
    torch.testing.assert_close(vae.decode(tokens), pixels, atol=ROUNDING, rtol=0)
    assert seen == [2, 2, 1]
    monkeypatch.setattr(openai_dvae, "PIXELS", 1)
    assert torch.equal(vae.encode(images), codes)


def test_no_pictures_give_none():
    vae = make()
    assert vae.encode(torch.rand(0, 3, 16, 16)).shape == (0, 4)
    assert vae.decode(torch.zeros(0, 4, dtype=torch.long)).shape == (0, 3, 16, 16)


def test_inputs_stay():
    vae = make()
    images, tokens = make_data(vae)
    pixels, ids = images.contiguous(memory_format=torch.channels_last), tokens.clone()
    vae.encode(pixels), vae.decode(ids)
    assert torch.equal(pixels, images)
    assert torch.equal(ids, tokens)


def test_the_first_of_equal_codes_is_taken():
    for dtype in (torch.float32, torch.bfloat16):
        vae = make().to(dtype)
        with torch.no_grad():
            vae.encoder.output.weight.zero_()
            vae.encoder.output.bias.zero_()[[5, 9]] = 1.0
        assert torch.equal(vae.encode(torch.rand(1, 3, 16, 16)), torch.full((1, 4), 5))


def test_halving_is_max_pooling():
    x = torch.randn(2, 5, 6, 8)
    assert torch.equal(halve(x), F.max_pool2d(x, 2))


def test_gradients_reach_every_weight_of_the_encoder():
    vae = make().train()
    vae.encode_logits(torch.rand(1, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.encoder.parameters())
    assert all(parameter.grad is None for parameter in vae.decoder.parameters())


def test_released_sizes_are_the_papers():
    with torch.device("meta"):
        vae = OpenAIDVAE(OpenAIDVAEConfig())
    assert (vae.grid_size, vae.num_image_tokens, vae.codebook_size) == (32, 1024, 8192)
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
    assert counts == [53_786_240, 43_829_766]


def test_a_dalle_takes_it():
    dalle = DALLE(DALLEConfig(dim=16, depth=1, heads=2, head_dim=8, text_vocab_size=9, text_len=5), vae=make())
    tokens = dalle.vae.encode(torch.rand(2, 3, 16, 16))
    assert dalle.loss(torch.randint(1, 9, (2, 5)), tokens).loss.isfinite()


def test_misfits_are_named():
    for settings, message in (
        ({"image_size": 20}, r"image_size \(20\) must be a multiple of 8"),
        ({"hidden_dim": 6}, r"hidden_dim \(6\) must be a multiple of 4"),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenAIDVAEConfig(**settings)
    vae = make()
    with pytest.raises(ValueError, match=r"\(3, 24, 24\).*\(3, 16, 16\)"):
        vae.encode(torch.rand(1, 3, 24, 24))
    with pytest.raises(ValueError, match="divide by 255"):
        vae.check_images(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"5 image tokens.*2 x 2"):
        vae.decode(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="ids 0 to 23"):
        vae.decode(torch.full((1, 4), 24))
