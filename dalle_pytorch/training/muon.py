"""Muon in fp32, for CPUs without instructions for bf16, in which torch's has its products."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Muon


class PreciseMuon(Muon):
    """torch.optim.Muon with its iteration in the weights' own type; its state is the same.

    Updates are scaled by sqrt(max(1, rows / columns)), torch's default, and in no other way.

    torch's products are in bf16, which a CPU without it emulates at a hundredth of its speed in fp32
    (``precision.fast_precision``).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is not None:
                    self._update(weights, weights.grad, group)
        return loss

    def _update(self, weights: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        momentum, state = group["momentum"], self.state[weights]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weights)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        direction = orthogonal(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = weights.shape
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.add_(direction, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonal(
    matrix: Float[Tensor, "rows columns"], coefficients: tuple[float, float, float], steps: int, eps: float
) -> Float[Tensor, "rows columns"]:
    """A matrix with the same singular vectors and singular values near 1, between 0.5 and 1.5.

    Args:
        matrix: of any scale.
        coefficients: of the odd polynomial of degree 5 that is applied to the singular values.
        steps: how often.
        eps: the least norm that is divided by.

    Source:
        The Newton-Schulz iteration of Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    first, third, fifth = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller Gram matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), wide, beta=first)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide
