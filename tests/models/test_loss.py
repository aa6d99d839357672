"""The chunked loss and the fp32 product equal their plain forms."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dalle_pytorch.models import loss as loss_module
from dalle_pytorch.models.linear import Linear, linear
from dalle_pytorch.models.loss import linear_cross_entropy, linear_nats


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 6), (5, 6)])
def test_the_product_is_that_of_a_linear_layer(shape, bias):
    x, weight = torch.randn(shape).requires_grad_(), torch.randn(4, 6).requires_grad_()
    offset = torch.randn(4).requires_grad_() if bias else None
    inputs = [value for value in (x, weight, offset) if value is not None]
    upper = torch.randn(*shape[:-1], 4)
    results = []
    for function in (linear, F.linear):
        out = function(x, weight, offset)
        assert out.is_contiguous()
        results.append([out, *torch.autograd.grad(out, inputs, upper)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def assert_summed_alike(given, expected):
    """Equal but for the order of sums over 10 rows and 9 classes; terms may cancel, so relative to the largest."""
    atol = 10 * 9 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    torch.testing.assert_close(given, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunks_give_the_loss_and_gradients_of_all_logits_at_once(monkeypatch, z_loss, bias):
    monkeypatch.setattr(loss_module, "ROWS", 4)
    head, x, targets = Linear(6, 9, bias=bias), torch.randn(10, 6).requires_grad_(), torch.randint(0, 9, (10,))
    inputs = [x, *head.parameters()]
    logits = F.linear(x, head.weight, head.bias)
    plain = F.cross_entropy(logits, targets) + z_loss * logits.logsumexp(-1).square().mean()
    ours = linear_cross_entropy(x, head, targets, z_loss=z_loss)
    torch.testing.assert_close(ours, plain)
    # times 3: what comes in from above is passed on
    for a, b in zip(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * plain, inputs), strict=True):
        assert_summed_alike(a, b)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, head, targets, z_loss=z_loss), plain)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_positions_that_do_not_count_have_no_part_in_loss_or_gradients(monkeypatch, z_loss):
    monkeypatch.setattr(loss_module, "ROWS", 4)
    head, x, targets = Linear(6, 9), torch.randn(10, 6).requires_grad_(), torch.randint(0, 9, (10,))
    inputs, counted = [x, *head.parameters()], torch.arange(10) % 3 == 0  # none in some places of a chunk
    ours = linear_cross_entropy(x, head, targets, z_loss=z_loss, counted=counted)
    plain = linear_cross_entropy(x[counted], head, targets[counted], z_loss=z_loss)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        assert_summed_alike(a, b)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, head, targets, z_loss=z_loss, counted=counted), plain)


@pytest.mark.parametrize("bias", [True, False])
def test_each_rows_nats_and_gradients_are_those_of_all_logits_at_once(monkeypatch, bias):
    monkeypatch.setattr(loss_module, "ROWS", 4)
    head, x, targets = Linear(6, 9, bias=bias), torch.randn(10, 6).requires_grad_(), torch.randint(0, 9, (10,))
    inputs, upper = [x, *head.parameters()], torch.randn(10)
    plain = F.cross_entropy(F.linear(x, head.weight, head.bias), targets, reduction="none")
    ours = linear_nats(x, head, targets)
    torch.testing.assert_close(ours, plain)
    gradients = [torch.autograd.grad(nats @ upper, inputs) for nats in (ours, plain)]
    for a, b in zip(*gradients, strict=True):
        assert_summed_alike(a, b)


def test_probabilities_as_targets_are_an_average_over_classes():
    head, x = Linear(6, 4), torch.randn(10, 6)
    probabilities = torch.rand(10, 4).softmax(dim=-1)
    of_class = torch.stack(
        [linear_cross_entropy(x[i : i + 1], head, torch.tensor([c])) for i in range(10) for c in range(4)]
    )
    expected = (probabilities * of_class.view(10, 4)).sum(dim=1).mean()
    torch.testing.assert_close(linear_cross_entropy(x, head, probabilities), expected)


def test_mixed_precision_keeps_the_weights_gradients_in_fp32():
    head, x = Linear(16, 9), torch.randn(10, 16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, head, torch.zeros(10, dtype=torch.long))
    loss.backward()
    assert loss.dtype == head.weight.grad.dtype == x.grad.dtype == torch.float32


def test_a_linear_layer_loads_and_is_found_as_torchs():
    layer = Linear(3, 2)
    assert isinstance(layer, nn.Linear)
    assert layer.state_dict().keys() == nn.Linear(3, 2).state_dict().keys()
