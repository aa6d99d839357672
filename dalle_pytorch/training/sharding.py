"""Weights, gradients and optimiser spread over processes (FSDP2), and what they become on disk."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from dalle_pytorch.models.blocks import BLOCKS

FORWARD_METHODS = ("loss", "reconstruct", "output", "encode", "decode", "encode_text", "encode_image")
"""Methods by which a training calls its network, in place of ``forward``."""


def shard(net: nn.Module, mesh: DeviceMesh, *, bf16: bool) -> None:
    """Spread the trainable weights: block by block, and what is left together.

    Frozen weights (a DALLE's image tokenizer) stay whole in every process, and so do single numbers (CLIP's scale),
    which cannot be split and whose gradient is the same everywhere.

    Args:
        net: the network; changed in place.
        mesh: the processes.
        bf16: gather weights in bfloat16; gradients are summed in fp32 in any case.
    """
    data = mesh["data_parallel"]
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
    whole = {p for p in net.parameters() if not p.requires_grad or p.ndim == 0}
    settings: dict[str, Any] = {"mesh": data, "mp_policy": policy, "ignored_params": whole}
    for part in net.modules():
        if isinstance(part, BLOCKS):
            fully_shard(part, **settings)
    fully_shard(net, **settings)
    for name in FORWARD_METHODS:
        if hasattr(net, name):
            register_fsdp_forward_method(net, name)


def whole_state(net: nn.Module) -> dict[str, Any]:
    """The weights of a sharded network in one piece, on the first process; to be called on all."""
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
