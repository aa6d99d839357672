"""Which arithmetic a machine can do at a bearable speed."""

import logging
from typing import Any

import torch

from dalle_pytorch.models.linear import onednn_computes

log = logging.getLogger(__name__)


def on_cpu(trainer: dict[str, Any]) -> bool:
    """Whether a trainer section trains on a CPU."""
    accelerator = trainer.get("accelerator", "auto")
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())


def fast_precision(trainer: dict[str, Any]) -> dict[str, Any]:
    """A trainer section in fp32 in place of bf16, and a word about it, where the CPU would emulate bf16.

    Torch computes bf16 on every CPU, but on one without such instructions (AVX-512 or newer on x86) a product takes a
    hundred times as long as in fp32 (174 and 1 GFLOP/s on two cores of an AMD EPYC 7003).
    """
    precision = str(trainer.get("precision"))
    if not precision.startswith("bf16") or not on_cpu(trainer) or onednn_computes(torch.bfloat16):
        return trainer
    log.warning("this CPU has no instructions for bf16: trainer.precision=32-true in place of %s", precision)
    return {**trainer, "precision": "32-true"}
