"""AdamW with decay groups, and its learning rate over time."""

from dataclasses import dataclass, field

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from dalle_pytorch.training.schedules import LR_SCHEDULES, lr_factor


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW, warm-up, cosine, clipping."""

    lr: float = 3e-4
    """Highest learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and convolutions; biases, norms and embeddings have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup_steps: int = 100
    """Steps to the full learning rate; 0 = none."""
    schedule: str = "cosine"
    """"cosine" over the whole training, or "constant"."""
    lr_min_ratio: float = 0.05
    """Last learning rate of the cosine, as part of ``lr``."""
    clip: float = 1.0
    """Largest gradient norm; 0 = off."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        for name in ("weight_decay", "warmup_steps", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.schedule not in LR_SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(LR_SCHEDULES)}, got {self.schedule!r}")
        if not 0 <= self.lr_min_ratio <= 1:
            raise ValueError(f"lr_min_ratio must lie in [0, 1], got {self.lr_min_ratio}")


def decay_groups(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay.

    Without: embeddings, and whatever has fewer than two axes (biases, norms, scales). Frozen parameters are in neither.
    A matrix shared with an embedding counts as an embedding.
    """
    embeddings = {id(p) for m in net.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    trainable = [p for p in net.parameters() if p.requires_grad]
    with_decay = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    without = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    return with_decay, without


def make_optimizer(net: nn.Module, config: OptimConfig, *, fused: bool = True) -> AdamW:
    """AdamW over the trainable parameters.

    Args:
        net: its frozen parameters are left out.
        config: rates.
        fused: one kernel for all parameters; not possible with float16 gradient scaling and clipping together.
    """
    with_decay, without = decay_groups(net)
    groups = [
        {"params": with_decay, "weight_decay": config.weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=fused,
    )  # fmt: skip


def make_scheduler(optimizer: AdamW, config: OptimConfig, total_steps: int) -> LambdaLR:
    """Warm-up and cosine over ``total_steps`` optimiser steps."""
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(
            step,
            total_steps=total_steps,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            min_ratio=config.lr_min_ratio,
        ),
    )
