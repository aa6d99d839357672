"""What makes sampling fast on a device: linear layers in an arithmetic of choice, and attention over a cache.

A step of sampling does little arithmetic. It reads every weight once for all candidates, and every key and value once
for its own candidate, so its time is the time that this reading takes. All that this file does is to read less, or to
read in the order that the memory likes:

- Weights are packed once into the layout of oneDNN's kernels. What ``F.linear`` calls on a CPU would pack them again
  at every step, which takes as long as reading them.
- "bf16" and "int8" weights are a half and a quarter of the bytes. CPUs with AMX or VNNI multiply them faster, too.
- Keys and values have 16 bits where the processor multiplies those directly (AMX); elsewhere torch's attention converts
  them one by one, which takes longer than reading 32 bits. (A compiled step has a kernel of its own: kernel.py.)
- Candidates of one prompt read its keys in one product. That product and the one over a candidate's own keys are two
  parts of one softmax, put together by their sums (as in FlashDecoding and cascade attention).

Scores, their softmax and the sums over values are fp32 whatever the type of the cache.

Axes: q positions in all, i inputs, o outputs; in attention g groups, c candidates of each, r = g * c rows, h heads,
q new positions, s keys, t keys of a prompt, e head_dim.
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


def prepare(module: nn.Module, precision: str, *, consume: bool = False) -> nn.Module:
    """A copy of a network for sampling: its linear layers replaced, all else shared with the original, in eval mode.

    Args:
        module: the network; not changed unless consumed.
        precision: "fp32", "bf16" (weights and inputs of linear layers rounded to 8 bits of mantissa), "fp16" (to 11;
            slow on a CPU) or "int8" (rounded to integers; CPU only).
        consume: take each weight out of the original once it is laid out, so that none is in memory twice.

    Raises:
        ValueError: unknown precision, or int8 elsewhere than on a CPU.
    """
    check_precision(precision, next(itertools.chain(module.parameters(), module.buffers())).device)

    def lay_out(linear: nn.Linear) -> nn.Module:
        made = Int8Linear(linear) if precision == "int8" else CastLinear(linear, precision)
        if consume:
            linear.weight = nn.Parameter(linear.weight.to("meta"), requires_grad=False)
        return made

    return replace(module, lay_out)


def prepare_head(head: nn.Linear, precision: str, *, consume: bool = False) -> nn.Module:
    """The layer that scores the codebook, as ``prepare`` does it; under int8 in bf16, where the CPU knows that."""
    if precision == "int8":
        precision = "bf16" if onednn_computes(torch.bfloat16) else "fp32"
    return prepare(head, precision, consume=consume)


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


def keys_dtype(precision: str, device: torch.device, *, kernel: bool = False) -> torch.dtype:
    """Type in which sampling keeps keys and values.

    fp32 with "fp32", and on a CPU that does not multiply 16 bits (see above); else fp16 with "fp16", and bf16 with
    "bf16" and "int8". In the kernel of compiled steps (kernel.py): bf16 with "bf16", int8 with "int8", else fp32.
    """
    if kernel:
        return {"bf16": torch.bfloat16, "int8": torch.int8}.get(precision, torch.float32)
    if precision == "fp32" or (device.type == "cpu" and (precision == "fp16" or not multiplies_bf16())):
        return torch.float32
    return torch.float16 if precision == "fp16" else torch.bfloat16


def multiplies_bf16() -> bool:
    """Whether this CPU has units for products of bf16 matrices (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def attend(
    q: Float[Tensor, "r h q e"],
    keys: Float[Tensor, "r h s e"],
    values: Float[Tensor, "r h s e"],
    prompt: Float[Tensor, "2 g h t e"] | None,
    bias: Float[Tensor, "q s"] | None,
) -> Float[Tensor, "r h q e"]:
    """Attention of new positions to their row's keys, and to the keys of their prompt, which its rows share.

    Args:
        q: queries.
        keys: a row's own keys.
        values: a row's own values.
        prompt: keys and values of the prompts, all visible; None = they are among the row's own.
        bias: added to the scores of a row's own keys, 0 or -inf; None = all are visible.
    """
    own, own_sum = part_of_attention(q, keys, values, bias)
    if prompt is None:
        return own
    (_, groups, heads, _, head_dim), count = prompt.shape, q.shape[2]
    together = q.view(groups, -1, heads, count, head_dim).transpose(1, 2).flatten(2, 3)  # [g, h, c * q, e]
    shared, shared_sum = part_of_attention(together, prompt[0], prompt[1], None)
    shared, shared_sum = (
        x.unflatten(2, (-1, count)).transpose(1, 2).flatten(0, 1) for x in (shared, shared_sum)
    )  # as q
    return torch.lerp(shared, own, torch.sigmoid(own_sum - shared_sum))


def part_of_attention(
    q: Float[Tensor, "b h q e"],
    k: Float[Tensor, "b h s e"],
    v: Float[Tensor, "b h s e"],
    bias: Float[Tensor, "q s"] | None,
) -> tuple[Float[Tensor, "b h q e"], Float[Tensor, "b h q 1"]]:
    """Attention to some keys, and the logarithm of the sum of their exponentiated scores, both in fp32.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the scores.
    """
    if k.device.type == "cpu":  # the kernel of F.scaled_dot_product_attention, which does not give the sums
        mask = None if bias is None else bias.to(k.dtype)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = kernel(q.to(k.dtype), k, v, attn_mask=mask)
        return out.float(), sums.view(*q.shape[:3], 1)
    rows, scale = q.shape[:2], q.shape[-1] ** -0.5
    q, k, v = ((q * scale).to(k.dtype).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    scores = products(q, k.transpose(1, 2))
    if bias is not None:
        scores = scores + bias
    sums = scores.logsumexp(dim=-1, keepdim=True)
    out = products((scores - sums).exp().to(v.dtype), v)
    return out.unflatten(0, rows), sums.unflatten(0, rows)


def products(left: Float[Tensor, "b m k"], right: Float[Tensor, "b k n"]) -> Float[Tensor, "b m n"]:
    """Batched products in fp32, whatever the type of what is multiplied."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


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

    def __init__(self, linear: nn.Linear, precision: str) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        weight = linear.weight.detach().to(self.dtype)
        self.outputs = len(weight)
        known = self.dtype != torch.float16 and onednn_computes(self.dtype)
        self.packed = weight.device.type == "cpu" and known
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 8)  # laid out for 8 rows, fast at all
            self.number = enlist(self)
        # plain attributes: a parameter's look-up takes longer than some of the products
        self.weight, self.bias = weight, None if linear.bias is None else linear.bias.detach().to(self.dtype)

    def forward(self, x: Float[Tensor, "*q i"]) -> Float[Tensor, "*q o"]:
        """``x @ weight.T + bias``."""
        rows = x if x.dtype == self.dtype else x.to(self.dtype)
        if not self.packed:
            out = F.linear(rows, self.weight, self.bias)
        elif torch.compiler.is_compiling():
            out = torch.ops.dalle_pytorch.packed_products(rows, self.number, self.outputs, self.dtype)
        else:
            out = self.products(rows)
        return out if x.dtype == self.dtype else out.to(x.dtype)

    def products(self, x: Shaped[Tensor, "*q i"]) -> Float[Tensor, "*q o"]:
        """The packed kernel."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer over 8-bit integers: one scale for each output's weights, one for each row of inputs.

    The sums are exact integers and a row is scaled by its own largest input, so a candidate does not depend on its
    neighbours, not even by rounding. On a CPU with VNNI the weight is laid out for oneDNN's kernels once, which take
    half the time of ``torch._int_mm`` at 2 to 16 rows.

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
        self.number = enlist(self)

    def forward(self, x: Float[Tensor, "*q i"]) -> Float[Tensor, "*q o"]:
        """``x @ weight.T + bias``, approximately."""
        rows = x.float()
        largest = rows.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-20)
        # -127 to 127, rounded, with 128 for zero, since oneDNN is fast for inputs without a sign
        steps = torch.addcdiv(self.shift, rows, largest, value=127).to(torch.uint8)
        if torch.compiler.is_compiling():
            out = torch.ops.dalle_pytorch.packed_products(steps, self.number, len(self.scale), torch.float32)
        else:
            out = self.products(steps)
        out = out.mul_(largest) if self.bias is None else torch.addcmul(self.bias, out, largest)
        return out.to(x.dtype)

    def products(self, x: Shaped[Tensor, "*q i"]) -> Float[Tensor, "*q o"]:
        """Scaled sums of products with the weight."""
        if self.packed:
            return torch.ops.onednn.qlinear_pointwise(
                x, 1.0, 128, self.weight, self.scale, self.zero, None, 1.0, 0, torch.float32, "none", [], ""
            )
        signed = (x - 128).view(torch.int8).flatten(0, -2)
        return (torch._int_mm(signed, self.weight) * self.scale).view(*x.shape[:-1], -1)


# What torch.compile cannot read, as a packed weight, it can call: an operator that finds its layer by number.
_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, CastLinear | Int8Linear] = weakref.WeakValueDictionary()


def enlist(layer: CastLinear | Int8Linear) -> int:
    """A number by which ``packed_products`` finds a layer as long as it lives."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


_OPERATORS = torch.library.Library("dalle_pytorch", "DEF")
_OPERATORS.define("packed_products(Tensor x, int layer, int outputs, ScalarType dtype) -> Tensor")
_OPERATORS.impl("packed_products", lambda x, layer, outputs, dtype: _LAYERS[layer].products(x), "CPU")


@torch.library.register_fake("dalle_pytorch::packed_products", lib=_OPERATORS)
def _shape_of_products(x: Tensor, layer: int, outputs: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs), dtype=dtype)
