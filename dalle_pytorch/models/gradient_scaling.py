"""A gradient scale for each residual branch, so that training in fp16 loses no small gradients.

Activation gradients shrink from the first block to the last, and no single loss scale fits all of them into fp16's five
bits of exponent. Here each branch has its own: the gradient that enters the branch is multiplied by the branch's scale,
and what leaves it, for the residual stream and for the branch's weights, is divided by it. The forward pass stays as it
is.

Source:
    Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, section 2.4, figure 4 and appendix D. We deviate: the paper
    multiplies start and bounds by the number of GPUs, since it divides the loss by the whole batch, while our loss is
    the mean over one GPU's batch and averaged afterwards; and only products are fp16 here, as in autocast: weights and
    their unscaled gradients must be fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.func import functional_call

UNIT = 1000
"""Scales are kept as whole thousandths of their binary logarithm: exact, and casts of the model leave them alone."""
START, LOWEST, HIGHEST = 13 * UNIT, 7 * UNIT, 24 * UNIT
GROWTH = 1
"""Times 2 ** (1 / 1000) at an update whose gradients are finite ..."""
CUT = UNIT // 2
"""... or divided by sqrt(2),"""
WINDOW = 125
"""but not twice within so many updates."""


class GradientScale(nn.Module):
    """The scale of one residual branch; saved with the model."""

    exponent: Tensor
    """1000 times the scale's binary logarithm."""
    wait: Tensor
    """Updates until it may be divided again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("exponent", torch.tensor(START))
        self.register_buffer("wait", torch.tensor(0))
        # whether a gradient since the last update was not finite; no buffer, which DDP would overwrite by rank 0's
        self.nonfinite: Tensor | None = None

    def branch(
        self, dtype: torch.dtype, norm: nn.Module, sublayer: nn.Module, post: nn.Module
    ) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
        """The modules of a branch as functions whose gradients are scaled in between.

        Weights are unscaled where they are used, not in their ``grad``: blocks may share them, and copies of the model
        need no hooks.

        Args:
            dtype: of the residual stream; the branch's output is cast to it, so that its gradient is scaled before it
                becomes fp16.
            norm: first of the branch.
            sublayer: attention or feed-forward.
            post: last of the branch.
        """
        scale = torch.exp2(self.exponent / UNIT)

        def unscaled(module: nn.Module) -> Callable[..., Tensor]:
            weights = {name: _Scaled.apply(p, p.dtype, 1 / scale, self) for name, p in module.named_parameters()}
            return lambda *inputs: functional_call(module, weights, inputs)

        first, last = unscaled(norm), unscaled(post)
        return (
            lambda x: first(_Scaled.apply(x, x.dtype, 1 / scale, self)),
            unscaled(sublayer),
            lambda y: _Scaled.apply(last(y), dtype, scale, self),
        )


class _Scaled(torch.autograd.Function):
    """The identity but for a cast; its gradient is multiplied, and what is not finite of it noted and set to 0.

    Without the filter one overflow would reach the scales of all earlier blocks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, factor: Tensor, scale: GradientScale) -> Tensor:
        """``x`` as ``dtype``."""
        ctx.dtype, ctx.factor, ctx.scale = x.dtype, factor, scale
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Multiplied in fp32."""
        scaled = (gradient.float() * ctx.factor).to(ctx.dtype)
        nonfinite = ~scaled.isfinite().all()
        ctx.scale.nonfinite = nonfinite if ctx.scale.nonfinite is None else ctx.scale.nonfinite | nonfinite
        return scaled.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), None, None, None


def update_scales(net: nn.Module) -> int:
    """Move all scales of a model, once per update, after the last backward pass before it and on every process.

    Args:
        net: a model with or without gradient scales.

    Returns:
        How many branches saw a gradient, on any process, that is not finite: above 0 the update is to be skipped.
    """
    scales = [module for module in net.modules() if isinstance(module, GradientScale)]
    if not scales:
        return 0
    finite = torch.zeros_like(scales[0].exponent, dtype=torch.bool)
    seen = torch.stack([finite if scale.nonfinite is None else scale.nonfinite for scale in scales]).int()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    exponents, waits = moved(
        torch.stack([scale.exponent for scale in scales]), torch.stack([scale.wait for scale in scales]), seen.bool()
    )
    for scale, exponent, wait in zip(scales, exponents, waits, strict=True):
        scale.exponent.copy_(exponent)
        scale.wait.copy_(wait)
        scale.nonfinite = None
    return int(seen.sum())


def moved(
    exponents: Int[Tensor, " n"], waits: Int[Tensor, " n"], nonfinite: Bool[Tensor, " n"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Scales after an update, and how long each must then wait until it may be divided.

    Args:
        exponents: thousandths of the binary logarithm.
        waits: updates, 0 = may be divided from the next one on.
        nonfinite: whether the branch saw a gradient that is not finite.

    Source:
        Appendix D.
    """
    divided = nonfinite & (waits == 0)
    step = torch.where(nonfinite, -CUT * divided.int(), GROWTH)
    return (exponents + step).clamp(LOWEST, HIGHEST), torch.where(divided, WINDOW - 1, (waits - 1).clamp(min=0))
