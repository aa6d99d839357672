"""Scales leave fp32 gradients alone, save those that fp16 loses, and move as in the paper."""

import copy
from contextlib import nullcontext

import pytest
import torch

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.models.gradient_scaling import HIGHEST, LOWEST, START, WINDOW, GradientScale, moved, update_scales

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
IMAGE = torch.arange(32).reshape(2, 16) * 5 % 12
TERMS = 2 * (5 + 16)
"""Positions, over which a weight's gradient is a sum."""


def pair(make_dalle, **settings):
    """Two models with the same weights, without and with scales."""
    plain, scaled = make_dalle(**settings), make_dalle(gradient_scaling=True, **settings)
    left = scaled.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys
    return plain.train(), scaled.train()


def gradients(dalle, *, factor=1.0, half=False):
    """Gradients by name of a loss that is `factor` times as large; `half`: products in fp16."""
    dalle.zero_grad()
    with torch.autocast("cpu", torch.float16) if half else nullcontext():
        hidden = dalle.hidden(TEXT, IMAGE)[1]  # without the heads, which have no scale
    (factor * hidden.float().square().mean()).backward()
    return {name: p.grad.clone() for name, p in dalle.transformer.named_parameters() if p.grad is not None}


def assert_rounded(given, expected):
    """Equal but for the last bits: scales that are no powers of two round every term of the sum anew.

    Terms may cancel in an element, so that its error is relative to the tensor's largest, not to its own size.
    """
    atol = TERMS * torch.finfo(torch.float32).eps * expected.abs().max()
    torch.testing.assert_close(given, expected, rtol=0, atol=float(atol))


def scales(dalle):
    return [module for module in dalle.modules() if isinstance(module, GradientScale)]


SETTINGS = [
    {},
    {"sandwich_norm": True, "qk_norm": True, "attn_types": ["axial_row", "full"]},
    {"shared_attn_ids": [0, 1], "shared_ff_ids": [0]},
    {"checkpoint_activations": True, "shared_ff_ids": [0]},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_nothing_changes_in_fp32(make_dalle, settings):
    plain, scaled = pair(make_dalle, **settings)
    for number, scale in enumerate(scales(scaled)):
        scale.exponent += 371 * number  # no two alike, none a power of two
    assert torch.equal(scaled.hidden(TEXT, IMAGE)[1], plain.hidden(TEXT, IMAGE)[1])
    expected, given = gradients(plain), gradients(scaled)
    assert expected.keys() == given.keys()
    for name in expected:
        assert_rounded(given[name], expected[name])
    assert update_scales(scaled) == 0


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_small_gradients_survive_fp16(make_dalle, checkpoint_activations):
    """A loss so small that fp16 has no number for its gradients."""
    plain, scaled = pair(make_dalle, checkpoint_activations=checkpoint_activations)
    exact = gradients(plain, factor=1e-6)
    lost, kept = gradients(plain, factor=1e-6, half=True), gradients(scaled, factor=1e-6, half=True)
    names = [name for name in exact if name.startswith("blocks") and name.endswith("weight") and "norm" not in name]
    assert len(names) == 4 * plain.config.depth
    for name in names:
        assert not lost[name].any(), name
        assert (kept[name] - exact[name]).norm() < 0.02 * exact[name].norm(), name
    assert update_scales(scaled) == 0


def overflow(module):
    """Make every gradient of a module's output infinite."""

    def hook(_module, _inputs, out):
        if out.requires_grad:
            out.register_hook(lambda g: torch.full_like(g, torch.inf))

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_an_overflow_stays_in_its_branch(make_dalle, checkpoint_activations):
    plain, scaled = pair(make_dalle, checkpoint_activations=checkpoint_activations)
    overflow(scaled.transformer.blocks[1].feed_forward.to_hidden)
    cut = plain.transformer.blocks[1].feed_forward.to_hidden  # what is left: as if nothing went back through the layer
    cut.register_forward_hook(lambda _module, _inputs, out: out.detach())
    expected, given = gradients(plain), gradients(scaled)
    for name, gradient in given.items():
        assert gradient.isfinite().all(), name
        if name in expected:
            assert_rounded(gradient, expected[name])
    assert update_scales(scaled) == 1
    exponents = [int(scale.exponent) for scale in scales(scaled)]
    hit = scales(scaled).index(scaled.transformer.blocks[1].ff_scale)
    assert exponents.pop(hit) == START - 500
    assert exponents == [START + 1] * 5


def test_a_skipped_update_moves_nothing(make_dalle):
    """The two calls that a training makes."""
    _, scaled = pair(make_dalle)
    overflow(scaled.transformer.blocks[0].attention)
    optimizer = torch.optim.AdamW([p for p in scaled.parameters() if p.requires_grad], weight_decay=0.1, fused=True)
    before = copy.deepcopy(list(scaled.parameters()))
    gradients(scaled)
    if update_scales(scaled):
        optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, scaled.parameters(), strict=True))


def test_overflows_of_accumulated_batches_are_remembered(make_dalle):
    _, scaled = pair(make_dalle)
    handle = overflow(scaled.transformer.blocks[2].attention)
    gradients(scaled)
    handle.remove()
    gradients(scaled)
    assert update_scales(scaled) == 1
    gradients(scaled)
    assert update_scales(scaled) == 0


def test_a_scale_that_is_too_high_comes_down_by_itself(make_dalle):
    _, scaled = pair(make_dalle)
    for scale in scales(scaled):
        scale.exponent.fill_(HIGHEST)
    gradients(scaled, factor=1e3, half=True)
    assert update_scales(scaled) == 6
    assert [int(scale.exponent) for scale in scales(scaled)] == [HIGHEST - 500] * 6


def test_processes_agree(make_dalle, monkeypatch):
    """What one process saw, all know: their scales would drift apart."""
    _, scaled = pair(make_dalle)
    gradients(scaled)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda seen, op: seen[4:].fill_(1))
    assert update_scales(scaled) == 2
    assert [int(scale.exponent) for scale in scales(scaled)] == [START + 1] * 4 + [START - 500] * 2


def test_scales_move_as_in_the_paper():
    exponents, waits = torch.tensor([START]), torch.tensor([0])
    assert 2 ** (START / 1000) == 2**13

    def update(nonfinite, times=1):
        nonlocal exponents, waits
        for _ in range(times):
            exponents, waits = moved(exponents, waits, torch.tensor([nonfinite]))
        return int(exponents)

    assert update(False, 1000) == 14_000  # twice as high
    assert update(True) == 13_500  # by sqrt(2)
    assert update(True, WINDOW - 1) == 13_500  # not again for 125 updates
    assert update(True) == 13_000
    assert update(False, WINDOW - 1) == 13_124
    assert update(True) == 12_624


def test_scales_move_apart_and_within_bounds():
    assert (2 ** (LOWEST / 1000), 2 ** (HIGHEST / 1000)) == (2**7, 2**24)
    exponents, waits = moved(
        torch.tensor([HIGHEST, LOWEST, START, START]),
        torch.tensor([0, 0, 3, 0]),
        torch.tensor([False, True, True, True]),
    )
    assert exponents.tolist() == [HIGHEST, LOWEST, START, START - 500]
    assert waits.tolist() == [0, WINDOW - 1, 2, WINDOW - 1]


def test_only_models_with_scales_save_them(make_dalle, tmp_path):
    plain, scaled = pair(make_dalle)
    extra = scaled.state_dict().keys() - plain.state_dict().keys()
    assert not [key for key in plain.state_dict() if "scale" in key]
    assert extra == {
        f"transformer.blocks.{i}.{sublayer}_scale.{name}"
        for i in range(3) for sublayer in ("attn", "ff") for name in ("exponent", "wait")
    }  # fmt: skip
    assert update_scales(plain) == 0
    overflow(scaled.transformer.blocks[1].attention)
    gradients(scaled)
    update_scales(scaled)
    checkpoint.save(scaled, tmp_path / "dalle.safetensors")
    loaded = checkpoint.load(tmp_path / "dalle.safetensors", kind="dalle")
    assert {key: int(value) for key, value in loaded.state_dict().items() if key in extra} == {
        key: int(scaled.state_dict()[key]) for key in extra
    }


def test_copies_and_casts_keep_their_scales(make_dalle):
    plain, scaled = pair(make_dalle)
    gradients(scaled)
    for scale in scales(scaled):
        scale.exponent += 1_001
    clone = copy.deepcopy(scaled)
    expected = gradients(plain)
    for name, gradient in gradients(clone).items():
        assert_rounded(gradient, expected[name])
    assert [int(scale.exponent) for scale in scales(clone.half())] == [START + 1_001] * 6


def test_one_batch_overfits_in_fp16(make_dalle):
    """Autocast to fp16 without any loss scale."""
    dalle = make_dalle(dim=64, depth=2, gradient_scaling=True).train()
    optimizer = torch.optim.AdamW([p for p in dalle.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = dalle.loss(TEXT, IMAGE)
        loss.loss.backward()
        if update_scales(dalle):
            optimizer.zero_grad()
        optimizer.step()
    assert loss.image < 0.3  # chance: ln 12 = 2.5
