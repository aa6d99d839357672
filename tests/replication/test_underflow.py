"""What is rounded, what is counted, and when an update is left out."""

import copy
from dataclasses import replace

import pytest
import torch

from dalle_pytorch.models.gradient_scaling import START
from dalle_pytorch.models.linear import Linear
from replication import underflow
from replication.arms import Job
from replication.underflow import Count, Training, UnderflowConfig, _Rounded, round_gradients

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
IMAGE = torch.arange(32).reshape(2, 16) * 5 % 12


def gradients(dalle, factor=1.0):
    dalle.zero_grad()
    (factor * dalle.hidden(TEXT, IMAGE)[1].square().mean()).backward()  # without the heads, which have no scale
    return {name: p.grad.clone() for name, p in dalle.transformer.named_parameters() if p.grad is not None}


def test_a_gradient_goes_through_fp16_and_is_counted():
    """The smallest number of fp16 is 2 ** -24; half of it and less is 0, above 65,520 is infinite."""
    given = torch.tensor([1.0, 1 + 2.0**-12, 2.0**-24, 2.0**-25, -(2.0**-30), 0.0, 65_504.0, 1e5, torch.inf])
    count, x = Count(), torch.zeros(9, requires_grad=True)
    _Rounded.apply(x, torch.float16, count).backward(given)
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 2.0**-24, 0.0, 0.0, 0.0, 65_504.0, torch.inf, torch.inf]
    assert (count.values, count.flushed) == (7, 2)
    assert count.squares == pytest.approx(2 + 65_504.0**2 + 1e10, rel=1e-3)
    count.on = False
    _Rounded.apply(x, torch.float16, count).backward(given)
    assert count.values == 7


def test_a_layer_is_rounded_as_autocast_does():
    """Against torch's own products in fp16, with gradients of which a part is flushed."""
    torch.manual_seed(3)
    weight, x = torch.randn(6, 8).half().float(), torch.randn(2, 5, 8).half().float()
    given = torch.randn(2, 5, 6) * 10.0 ** torch.linspace(-9, 0, 6)

    def backward(layer, half):
        with torch.no_grad():
            layer.weight.copy_(weight)
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=half):
            output = layer(inputs)
        output.float().backward(given)
        return inputs.grad

    simulated, count = Linear(8, 6), Count()
    underflow._round_gradients(simulated, torch.float16, count)
    expected = backward(Linear(8, 6), True)
    torch.testing.assert_close(backward(simulated, False), expected, rtol=2**-10, atol=2.0**-24)
    assert 0.1 < count.flushed / count.values < 0.5


def test_fp32_changes_nothing(make_dalle):
    plain = make_dalle().train()
    rounded = copy.deepcopy(plain)
    counts = round_gradients(list(rounded.transformer.blocks), torch.float32)
    expected, given = gradients(plain), gradients(rounded)
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    assert len(counts) == 3
    assert all(count.values > 1000 and count.flushed == 0 for count in counts)


def test_scales_of_branches_keep_what_fp16_flushes(make_dalle):
    """A loss so small that fp16 has no number for its gradients."""
    plain = make_dalle().train()
    exact, kept = gradients(plain, 1e-6), {}
    for scaling in (False, True):
        dalle = make_dalle(gradient_scaling=scaling).train()
        dalle.load_state_dict(plain.state_dict(), strict=False)
        counts = round_gradients(list(dalle.transformer.blocks), torch.float16)
        found = gradients(dalle, 1e-6)
        kept[scaling] = sum(count.flushed for count in counts) / sum(count.values for count in counts)
        name = "blocks.0.feed_forward.to_hidden.weight"
        assert ((found[name] - exact[name]).norm() < 0.02 * exact[name].norm()) == scaling
    assert kept[False] > 0.9
    assert kept[True] < 0.1


def trained(make_dalle, steps=3, **settings):
    torch.manual_seed(0)
    config = UnderflowConfig(steps=10, **settings)
    dalle = make_dalle(gradient_scaling=config.scaling == "block").train()
    round_gradients(list(dalle.transformer.blocks), underflow.FORMATS[config.format])
    training = Training(dalle, config, 0)
    for _ in range(steps):
        training.step(TEXT, IMAGE)
    return training


def test_the_divisor_of_the_loss_cancels_in_fp32(make_dalle):
    whole, part = (trained(make_dalle, format="fp32", loss_divisor=divisor) for divisor in (1.0, 1024.0))
    for a, b in zip(whole.weights, part.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaling", underflow.SCALINGS)
def test_an_overflow_leaves_an_update_out(make_dalle, scaling):
    """A loss so large that fp16 overflows; scales then go down."""
    still = trained(make_dalle, steps=0, scaling=scaling, loss_divisor=1e-9)
    training = trained(make_dalle, steps=2, scaling=scaling, loss_divisor=1e-9)
    assert training.skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(still.weights, training.weights, strict=True))
    expected = {"none": 0.0, "global": 14.0, "block": START / 1000 - 0.5}
    assert training.scales() == [expected[scaling]] * 3


@pytest.mark.parametrize("scaling", underflow.SCALINGS)
def test_updates_are_taken_otherwise(make_dalle, scaling):
    """Scaled or not, to the precision of fp16 the same weights as in fp32."""
    training, exact = trained(make_dalle, scaling=scaling), trained(make_dalle, format="fp32")
    assert training.skipped == 0
    start = trained(make_dalle, steps=0).weights
    for a, b, c in zip(training.weights, exact.weights, start, strict=True):
        assert (a - b).norm() <= 0.2 * (b - c).norm()


@pytest.mark.parametrize("scaling", ["global", "block"])
def test_an_arm(shared, tmp_path, scaling):
    settings = ("dim=16", "depth=2", "batch_size=4", "steps=12", f"scaling={scaling}")
    found = underflow.run(Job("underflow", settings, 0, tmp_path, shared, 1))
    assert found.numbers["flushed"] < 5
    assert found.numbers["skipped"] == 0
    assert {len(curve.x) for name, curve in found.curves.items() if "block" in name} == {2}
    assert len(found.curves["training loss (by step)"].y) == 12
    assert underflow.run(Job("underflow", settings, 0, tmp_path, shared, 1)) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "fp8"}, "got 'fp8'"), ({"scaling": "all"}, "got 'all'"), ({"loss_divisor": 0.0}, "got 0")],
)
def test_impossible_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(UnderflowConfig(), **change)
