"""The transformers of released CLIPs: text tower, image tower, and SigLIP's pooling by attention.

Papers: Radford et al. 2021, https://arxiv.org/abs/2103.00020; Zhai et al. 2023 (SigLIP),
https://arxiv.org/abs/2303.15343. The arithmetic is that of clip/model.py of github.com/openai/CLIP and, for SigLIP, of
models/siglip/modeling_siglip.py of transformers.

Axes: b batch, t positions, d width, e features, c channels, H W pixels.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.models.linear import Linear


def quick_gelu(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """OpenAI's approximation of GELU, x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """GELU by its tanh formula, as JAX computes it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu, "gelu_tanh": gelu_tanh}


class LayerNorm(nn.LayerNorm):
    """Layer norm in fp32 whatever its weights and its input are, as in OpenAI's ``LayerNorm``."""

    def forward(self, input: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The normalised input, in its own type."""
        normalised = F.layer_norm(
            input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normalised.to(input.dtype)


def attention(
    q: Float[Tensor, "b q d"], k: Float[Tensor, "b t d"], v: Float[Tensor, "b t d"], heads: int, *, causal: bool
) -> Float[Tensor, "b q d"]:
    """Softmax attention of several heads, scaled by 1 / sqrt(head width)."""
    q, k, v = (rearrange(x, "b t (h d) -> b h t d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "b h t d -> b t (h d)")


class Block(nn.Module):
    """A pre-norm transformer block with biases everywhere."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.activation = heads, causal, ACTIVATIONS[activation]
        self.norm1, self.norm2 = LayerNorm(width, eps=eps), LayerNorm(width, eps=eps)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Attention, then the MLP, each added to its input."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(attention(q, k, v, self.heads, causal=self.causal))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class AttentionPool(nn.Module):
    """SigLIP's pooling: a learned query reads all patches, an MLP follows."""

    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float) -> None:
        super().__init__()
        self.heads, self.activation = heads, ACTIVATIONS[activation]
        self.query = nn.Parameter(torch.randn(width) * width**-0.5)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.norm = LayerNorm(width, eps=eps)
        self.up, self.down = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b d"]:
        """What the query finds."""
        width = x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        query = F.linear(self.query.to(x.dtype), weight[:width], bias[:width]).expand(len(x), 1, width)
        k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        found = self.out(attention(query, k, v, self.heads, causal=False))
        return (found + self.down(self.activation(self.up(self.norm(found)))))[:, 0]


class VisionTransformer(nn.Module):
    """An image tower: CLIP's (class token) or SigLIP's (pooling by attention).

    Args:
        grid: patches in a row.
        pool: "class": class token, norm before the blocks, projection without bias; "attention": none of the three,
            patches with a bias, and ``AttentionPool``.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        embed_dim: int,
        activation: str,
        eps: float,
        pool: str,
    ) -> None:
        super().__init__()
        by_class, scale = pool == "class", width**-0.5  # scale: OpenAI's initialisation, clip/model.py
        self.patches = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=not by_class)
        self.class_token = nn.Parameter(scale * torch.randn(width)) if by_class else None
        self.positions = nn.Parameter(scale * torch.randn(grid**2 + by_class, width))
        self.norm_pre = LayerNorm(width, eps=eps) if by_class else None
        self.blocks = nn.ModuleList(Block(width, heads, hidden, activation, eps, causal=False) for _ in range(depth))
        self.norm_post = LayerNorm(width, eps=eps)
        self.pool = None if by_class else AttentionPool(width, heads, hidden, activation, eps)
        self.proj = Linear(width, embed_dim, bias=False) if by_class else None

    def forward(self, pixels: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Features, not yet of unit length, of normalised pixels."""
        x = self.patches(pixels.to(self.patches.weight.dtype)).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.positions.to(x.dtype)
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        for block in self.blocks:
            x = block(x)
        if self.pool is not None:
            return self.pool(self.norm_post(x))
        assert self.proj is not None  # pooled by the class token
        return self.proj(self.norm_post(x[:, 0]))


class TextTower(nn.Module):
    """A text tower over framed text tokens of the full context."""

    def __init__(
        self,
        *,
        vocab_size: int,
        context_len: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        embed_dim: int,
        activation: str,
        eps: float,
        causal: bool,
        proj_bias: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(0.01 * torch.randn(context_len, width))  # 0.01, 0.02: clip/model.py
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, activation, eps, causal=causal) for _ in range(depth))
        self.norm = LayerNorm(width, eps=eps)
        self.proj = Linear(width, embed_dim, bias=proj_bias)

    def forward(self, framed: Int[Tensor, "b t"], pooled_at: Int[Tensor, " b"]) -> Float[Tensor, "b e"]:
        """Features, not yet of unit length, as seen at one position of each text."""
        x = (self.tokens(framed) + self.positions).to(self.proj.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return self.proj(self.norm(x[torch.arange(len(x), device=x.device), pooled_at]))
