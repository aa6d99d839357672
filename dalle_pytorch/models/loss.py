"""Cross entropy of a linear layer's outputs that never holds all of them."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dalle_pytorch.models.linear import Linear, linear

ROWS = 512
"""Positions whose logits exist at a time: 16 MB for the paper's 8,192 codes in fp32."""


def linear_cross_entropy(
    x: Float[Tensor, "n d"],
    head: Linear,
    targets: Int[Tensor, " n"] | Float[Tensor, "n k"],
    *,
    z_loss: float = 0.0,
    counted: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross entropy of ``head(x)`` in fp32, nats.

    Logits are computed a few hundred positions at a time and their gradients taken at once, so that memory does not
    grow with positions times vocabulary; the gradients of the three inputs are all that waits for the backward pass.

    Args:
        x: inputs of the last layer.
        head: the last layer.
        targets: the right class of each position, or the probability of every class (sums of 1).
        z_loss: weight of the mean of log(Z) ** 2, which keeps logits from drifting; 0 = none.
        counted: which positions the means are over; None = all.

    Source:
        z-loss: Chowdhery et al. 2022 (PaLM), section 5, there 1e-4.
    """
    weights = x.new_ones(len(x), dtype=torch.float32) if counted is None else counted.float()
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(x, head.weight, head.bias, targets, weights, z_loss)
    dtype = _product_type(x.device.type, head.weight)
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)
    parts = zip(x.to(dtype).split(ROWS), targets.split(ROWS), weights.split(ROWS), strict=True)
    sums = [_sum(part, weight, bias, target, weights_of, z_loss) for part, target, weights_of in parts]
    return torch.stack(sums).sum() / weights.sum()


def linear_nats(
    x: Float[Tensor, "n d"], head: Linear, targets: Int[Tensor, " n"], *, classes: int | None = None
) -> Float[Tensor, " n"]:
    """Cross entropy of each row of ``head(x)`` in fp32, nats; logits are computed in chunks, and again in backward.

    Args:
        x: inputs of the last layer.
        head: the last layer.
        targets: the right class of each position.
        classes: the softmax is over the first so many rows of the head; None = over all.
    """
    weight, bias = head.weight, head.bias
    if classes is not None:
        weight, bias = weight[:classes], None if bias is None else bias[:classes]

    def nats(rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        dtype = _product_type(rows.device.type, weight)
        bias = None if bias is None else bias.to(dtype)
        return _nats(rows.to(dtype), weight.to(dtype), bias, targets)[0]

    parts = zip(x.split(ROWS), targets.split(ROWS), strict=True)
    how = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in it is random
    return torch.cat([checkpoint(nats, rows, weight, bias, wanted, **how) for rows, wanted in parts])


class _ChunkedLoss(torch.autograd.Function):
    """Gradients are taken in the forward pass, chunk by chunk, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, z_loss: float
    ) -> Tensor:
        """The loss; keeps the gradients of the first three."""
        dtype = _product_type(x.device.type, weight)
        leaves = [value.detach().to(dtype).requires_grad_() for value in (weight, bias) if value is not None]
        sums = [torch.zeros_like(value, dtype=torch.float32) for value in leaves]  # over chunks
        dx, total, count = torch.empty_like(x), x.new_zeros((), dtype=torch.float32), weights.sum()
        for start in range(0, len(x), ROWS):
            rows = slice(start, start + ROWS)
            with torch.enable_grad():
                part = x[rows].detach().to(dtype).requires_grad_()
                loss = _sum(
                    part, leaves[0], leaves[1] if bias is not None else None, targets[rows], weights[rows], z_loss
                )
                first, *rest = torch.autograd.grad(loss / count, [part, *leaves])
            dx[rows] = first
            for value, gradient in zip(sums, rest, strict=True):
                value += gradient
            total += loss.detach()
        ctx.save_for_backward(dx, *(value.to(weight.dtype) for value in sums))
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The kept gradients times the one that comes in."""
        dx, dweight, *dbias = (value * gradient for value in ctx.saved_tensors)
        return dx, dweight, dbias[0] if dbias else None, None, None, None


def _product_type(device: str, weight: Tensor) -> torch.dtype:
    """bfloat16 where mixed precision says so, but never float16, as in the paper (2.4, figure 4)."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return torch.bfloat16
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def _sum(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, z_loss: float) -> Tensor:
    """Summed loss of a few positions, each times its weight; the product is of the type that its inputs have."""
    nats, logits = _nats(x, weight, bias, targets)
    loss = (nats * weights).sum()
    return loss + z_loss * (logits.logsumexp(dim=-1).square() * weights).sum() if z_loss else loss


def _nats(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each position, and its logits in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        logits = linear(x[None], weight, bias)[0].float()
    return F.cross_entropy(logits, targets, reduction="none"), logits
