"""The linear layer of the transformers."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

ONEDNN = torch.backends.mkldnn.is_available()


class Linear(nn.Linear):
    """``nn.Linear``, computed by ``linear``."""

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """``input @ weight.T + bias``."""
        return linear(input, self.weight, self.bias)


def linear(
    x: Float[Tensor, "*b i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None
) -> Float[Tensor, "*b o"]:
    """``F.linear``; in fp32 on a CPU as the convolution with a 1 x 1 kernel, which is the same product.

    torch multiplies fp32 matrices with MKL, and convolutions, forward and backward, with oneDNN: where MKL does not use
    all of a processor's instructions (AMD's) that is twice as fast (benchmarks/training.py). 16-bit products are
    oneDNN's anyway.
    """
    as_it_is = x.ndim != 3 or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if as_it_is or not ONEDNN:
        return F.linear(x, weight, bias)
    # [b, i, 1, q], channels last: a view of x
    return F.conv2d(x.transpose(1, 2).unsqueeze(2), weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


def onednn_computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN has kernels for numbers of a type on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or (dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())
