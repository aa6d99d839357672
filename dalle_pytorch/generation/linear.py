"""Linear layers laid out for sampling: the same weights, in an arithmetic of choice.

Axes: q positions in all, i inputs, o outputs.
"""

import copy
import itertools
import logging
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.linear import onednn_computes

log = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(module: nn.Module, precision: str, *, packed: bool = True, consume: bool = False) -> nn.Module:
    """A copy of a network for sampling: its linear layers replaced, all else shared with the original, in eval mode.

    Args:
        module: the network; not changed unless consumed.
        precision: "fp32", "bf16" (weights and inputs of linear layers rounded to 8 bits of mantissa), "fp16" (to 11;
            slow on a CPU) or "int8" (rounded to integers; CPU only).
        packed: lay weights out for oneDNN on a CPU; what ``torch.compile`` reads must not be.
        consume: take each weight out of the original once it is laid out, so that none is in memory twice.

    Raises:
        ValueError: unknown precision, or int8 elsewhere than on a CPU.
    """
    check_precision(precision, next(itertools.chain(module.parameters(), module.buffers())).device)

    def lay_out(linear: nn.Linear) -> nn.Module:
        made = Int8Linear(linear) if precision == "int8" else CastLinear(linear, precision, packed=packed)
        if consume:
            linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
        return made

    return replace(module, lay_out)


def prepare_head(head: nn.Linear, precision: str, *, packed: bool = True, consume: bool = False) -> nn.Module:
    """The layer that scores the codebook, as ``prepare`` does it; under int8 in bf16, where the CPU knows that."""
    if precision == "int8":
        precision = "bf16" if onednn_computes(torch.bfloat16) else "fp32"
    return prepare(head, precision, packed=packed, consume=consume)


def keep_stored(module: nn.Module) -> nn.Module:
    """A copy of a network for sampling as of ``prepare``, with a ``StoredLinear`` for each linear layer."""
    return replace(module, StoredLinear)


def replace(module: nn.Module, lay_out: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy of a network with its linear layers replaced, all else shared with the original, in eval mode."""
    done: dict[nn.Module, nn.Module] = {}  # layers may share weights

    def convert(part: nn.Module) -> nn.Module:
        if part not in done:
            if isinstance(part, nn.Linear):
                done[part] = lay_out(part)
            else:
                done[part] = copy.copy(part)
                done[part]._modules = {name: convert(child) for name, child in part.named_children()}
            done[part].training = False
        return done[part]

    return convert(module)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that is unknown or that a device does not have; warn of one that a CPU emulates.

    Raises:
        ValueError: names both.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "int8" and device.type != "cpu":
        raise UserError(f"precision=int8 runs on a CPU only, the model is on {device}; use bf16 there")
    if precision == "bf16" and device.type == "cpu" and not onednn_computes(torch.bfloat16):
        log.warning("this CPU has no instructions for bf16 and emulates it a hundred times as slowly: use fp32 or int8")


def keys_dtype(precision: str, device: torch.device, compiled: bool) -> torch.dtype:
    """Type in which sampling keeps keys and values.

    16 bits halve the memory; but torch reads them slower than fp32 on a CPU, unless a compiled program does. So fp32
    with "fp32", and on a CPU that is not ``compiled``; else fp16 with "fp16", and bf16 with "bf16" and "int8".
    """
    if precision == "fp32" or (device.type == "cpu" and not compiled):
        return torch.float32
    return torch.float16 if precision == "fp16" else torch.bfloat16


class StoredLinear(nn.Module):
    """A linear layer whose weight stays as it is stored, and is turned into its input's type at every call.

    For what runs once a prompt: half the memory where 16 bits are stored and fp32 is computed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Float[Tensor, "*q i"]) -> Float[Tensor, "*q o"]:
        """``x @ weight.T + bias``."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class CastLinear(nn.Module):
    """A linear layer that computes in fp32, bf16 or fp16 and answers in its input's type.

    On a CPU the weight is laid out for oneDNN's kernels once: in fp32 they are twice as fast as what ``F.linear`` calls
    here, in bf16 1.1 to 1.3 times (benchmarks/sampling.py), and a row's result does not depend on the number of rows.
    """

    def __init__(self, linear: nn.Linear, precision: str, *, packed: bool = True) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        weight = linear.weight.detach().to(self.dtype)
        known = self.dtype != torch.float16 and onednn_computes(self.dtype)
        self.packed = packed and weight.device.type == "cpu" and known
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)  # laid out for 8 rows, fast at all
        # plain attributes: a parameter's look-up takes longer than some of the products
        self.weight, self.bias = weight, None if linear.bias is None else linear.bias.detach().to(self.dtype)

    def forward(self, x: Float[Tensor, "*q i"]) -> Float[Tensor, "*q o"]:
        """``x @ weight.T + bias``."""
        if self.packed:
            out = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], "")
        else:
            out = F.linear(x.to(self.dtype), self.weight, self.bias)
        return out.to(x.dtype)


class Int8Linear(nn.Module):
    """A linear layer over 8-bit integers: one scale for each output's weights, one for each row of inputs.

    The sums are exact integers and a row is scaled by its own largest input, so a candidate does not depend on its
    neighbours, not even by rounding. On a CPU with VNNI the weight is laid out for oneDNN's kernels once, which take
    half the time of ``torch._int_mm`` at 2 to 16 rows, also under ``torch.compile``.

    Source:
        The scheme of Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, section 3, without its outlier columns.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        weight = (weight / scale[:, None]).round().to(torch.int8)
        # without VNNI oneDNN adds pairs of products in 16 bits, which can overflow
        self.packed = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
        self.weight = torch.ops.onednn.qlinear_prepack(weight, None) if self.packed else weight.T
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.scale = scale / 127  # all of it but a row's largest input
        self.zero = torch.zeros(len(scale), dtype=torch.long)  # of the weights, which are symmetric
        self.shift = torch.tensor(128.5)
        self.number = next(_NUMBERS)
        _LAYERS[self.number] = self

    def forward(self, x: Float[Tensor, "*q i"]) -> Float[Tensor, "*q o"]:
        """``x @ weight.T + bias``, approximately."""
        rows = x.float()
        largest = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-20)
        # -127 to 127, rounded, with 128 for zero, since oneDNN is fast for inputs without a sign
        steps = torch.addcdiv(self.shift, rows, largest, value=127).to(torch.uint8)
        if torch.compiler.is_compiling():
            out = torch.ops.dalle_pytorch.int8_products(steps, self.number, len(self.scale))
        else:
            out = self.products(steps)
        out = out.mul_(largest) if self.bias is None else torch.addcmul(self.bias, out, largest)
        return out.to(x.dtype)

    def products(self, steps: Shaped[Tensor, "*q i"]) -> Float[Tensor, "*q o"]:
        """Scaled sums of products with the weight."""
        if self.packed:
            return torch.ops.onednn.qlinear_pointwise(
                steps, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
            )
        signed = (steps - 128).view(torch.int8).flatten(0, -2)
        return (torch._int_mm(signed, self.weight) * self.scale).view(*steps.shape[:-1], -1)


# What torch.compile cannot read, as a packed weight, it can call: an operator that finds its layer by number.
_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, Int8Linear] = weakref.WeakValueDictionary()
_OPERATORS = torch.library.Library("dalle_pytorch", "DEF")
_OPERATORS.define("int8_products(Tensor steps, int layer, int outputs) -> Tensor")
_OPERATORS.impl("int8_products", lambda steps, layer, outputs: _LAYERS[layer].products(steps), "CPU")


@torch.library.register_fake("dalle_pytorch::int8_products", lib=_OPERATORS)
def _shape_of_products(steps: Tensor, layer: int, outputs: int) -> Tensor:
    return steps.new_empty((*steps.shape[:-1], outputs), dtype=torch.float32)
