"""Optimisers with decay groups, and their learning rate over time."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dalle_pytorch.config import build
from dalle_pytorch.errors import UserError, not_negative
from dalle_pytorch.models.blocks import STACKS
from dalle_pytorch.models.linear import onednn_computes
from dalle_pytorch.training.muon import PreciseMuon
from dalle_pytorch.training.schedules import LR_SCHEDULES, lr_factor

KINDS = ("adamw", "muon", "adamw8bit")


@dataclass(kw_only=True)
class OptimConfig:
    """Optimiser, warm-up, schedule, clipping."""

    kind: str = "adamw"
    """"adamw"; "muon" (Muon for the matrices inside transformers, AdamW for all else: without a transformer, AdamW for
    everything); or "adamw8bit" (bitsandbytes: the moments of tensors with 4,096 elements or more in 8 bits)."""
    lr: float = 3e-4
    """Highest learning rate."""
    muon_lr: float = 0.02
    """Highest learning rate of what Muon optimises; torch's and Keller Jordan's advice."""
    muon_momentum: float = 0.95
    """Decay rate of Muon's momentum, in [0, 1)."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and convolutions; biases, norms and embeddings have none."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    warmup_steps: int = 100
    """Steps to the full learning rate; 0 = none."""
    schedule: str = "cosine"
    """"cosine" over the whole training, "wsd" (constant and at the end a line down: a training that is not there yet
    can be lengthened), "paper" (halved now and then), or "constant"."""
    lr_min_ratio: float = 0.05
    """Last learning rate of the cosine and of wsd, as part of the highest."""
    decay_share: float = 0.2
    """Part of the training in which "wsd" goes down."""
    halvings: int = 5
    """How often "paper" halves the learning rate."""
    clip: float = 1.0
    """Largest gradient norm; 0 = off."""
    custom: dict[str, Any] = field(default_factory=dict)
    """An optimiser of your own in place of ``kind``: ``_target_`` and its arguments; ``lr``, ``weight_decay`` and the
    schedule above are applied to it."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        if self.kind not in KINDS:
            raise UserError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("lr", "muon_lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.muon_momentum < 1:
            raise UserError(f"muon_momentum must lie in [0, 1), got {self.muon_momentum}")
        not_negative(self, "weight_decay", "warmup_steps", "clip", "halvings")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.schedule not in LR_SCHEDULES:
            raise UserError(f"schedule must be one of {', '.join(LR_SCHEDULES)}, got {self.schedule!r}")
        if not 0 <= self.lr_min_ratio <= 1:
            raise UserError(f"lr_min_ratio must lie in [0, 1], got {self.lr_min_ratio}")
        if not 0 < self.decay_share <= 1:
            raise UserError(f"decay_share must lie in (0, 1], got {self.decay_share}")


def decay_groups(net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters with and without weight decay.

    Without: embeddings, and whatever has fewer than two axes (biases, norms, scales). Frozen parameters are in neither.
    A matrix shared with an embedding counts as an embedding.
    """
    embeddings = _embeddings(net)
    trainable = [p for p in net.parameters() if p.requires_grad]
    with_decay = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
    without = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
    return with_decay, without


def inner_matrices(net: nn.Module) -> list[nn.Parameter]:
    """Trainable matrices inside the net's transformers, each once; no embedding, nothing shared with one, no head."""
    embeddings = _embeddings(net)
    transformers = nn.ModuleList(module for module in net.modules() if isinstance(module, STACKS))
    return [p for p in transformers.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in embeddings]


def make_optimizer(net: nn.Module, config: OptimConfig, *, fused: bool = True) -> Optimizer:
    """One optimiser over the trainable parameters.

    Args:
        net: its frozen parameters are left out.
        config: kind and rates.
        fused: one AdamW kernel for all parameters; not possible with float16 gradient scaling and clipping together.
            "adamw8bit" has kernels of its own.

    Raises:
        ValueError: "adamw8bit" without the package bitsandbytes.
    """
    matrices = inner_matrices(net) if config.kind == "muon" else []
    taken = {id(p) for p in matrices}
    with_decay, without = ([p for p in part if id(p) not in taken] for part in decay_groups(net))
    groups = [
        {"params": with_decay, "weight_decay": config.weight_decay},
        {"params": without, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.custom:
        return build(config.custom, "optim.custom", groups, lr=config.lr)
    beta1, beta2 = config.betas
    if config.kind == "adamw8bit":
        return _adamw8bit()(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps)
    adamw = AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=config.eps, fused=fused)
    if not matrices:
        return adamw
    # The update of a matrix is scaled by sqrt(max(1, rows / columns)), torch's default. We deviate from Jordan's post
    # in one thing: the matrix of queries, keys and values is orthogonalised whole, not in three.
    slow = matrices[0].device.type == "cpu" and not onednn_computes(torch.bfloat16)
    kind = PreciseMuon if slow else Muon
    muon = kind(matrices, lr=config.muon_lr, momentum=config.muon_momentum, weight_decay=config.weight_decay)
    return MuonAdamW(muon, adamw)


class MuonAdamW(Optimizer):
    """Muon and AdamW as one optimiser: Lightning's automatic optimisation, schedulers and checkpoints see only this.

    Args:
        muon: over the inner matrices.
        adamw: over all else.

    Source:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; rates and division of labour as in the
        documentation of torch.optim.Muon.
    """

    def __init__(self, muon: Muon, adamw: AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Anew in each step: load_state_dict replaces groups and state by others. Only Muon's groups have a momentum.
        self.muon.param_groups = [group for group in self.param_groups if "momentum" in group]
        self.adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self.muon.state = self.adamw.state = self.state
        self.muon.step()
        self.adamw.step()
        return loss


def make_scheduler(optimizer: Optimizer, config: OptimConfig, total_steps: int) -> LambdaLR:
    """Warm-up and schedule over ``total_steps`` optimiser steps; the rates of all groups follow it."""
    return LambdaLR(
        optimizer,
        lambda step: lr_factor(
            step,
            total_steps=total_steps,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            min_ratio=config.lr_min_ratio,
            halvings=config.halvings,
            decay_share=config.decay_share,
        ),
    )


def _embeddings(net: nn.Module) -> set[int]:
    """Ids of embeddings."""
    return {id(p) for m in net.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}


def _adamw8bit() -> Callable[..., Optimizer]:
    """AdamW8bit's class (Dettmers et al. 2021, https://arxiv.org/abs/2110.02861)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("optim=adamw8bit needs the package bitsandbytes: pip install bitsandbytes")
    from bitsandbytes.optim import AdamW8bit  # it takes a second to import and is optional

    return AdamW8bit
