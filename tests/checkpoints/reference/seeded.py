"""Weights from a seed, the same for a reference implementation and for ours, so that no fixture has to hold them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fill(state: Mapping[str, Tensor], seed: int = 0) -> None:
    """Fill floating tensors in place: norms' weights near 1, vectors near 0, matrices for outputs of the inputs' size.

    A tensor depends on the seed and its own key only.
    """
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        # uniform numbers: a fixed product of integers, where normal ones depend on the machine's logarithm
        noise = torch.rand(tensor.shape, generator=generator) * 2 - 1
        if tensor.ndim < 2:
            noise = 0.2 * noise + (1.0 if key.endswith("weight") else 0.0)
        else:
            noise = noise * (3 / tensor[0].numel()) ** 0.5
        tensor.copy_(noise)


def checksum(state: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and numbers."""
    digest = hashlib.sha256()
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
