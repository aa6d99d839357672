"""Transformer blocks: what dalle.py and clip.py share unchanged.

Axes: b batch, q positions given in this call, d width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_pytorch.errors import UserError, at_least_one
from dalle_pytorch.models.attention import ROTARIES, Attention, LayerView
from dalle_pytorch.models.gradient_scaling import GradientScale
from dalle_pytorch.models.linear import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}
NORMS: dict[str, Callable[[int, bool], nn.Module]] = {
    "layer": lambda dim, bias: nn.LayerNorm(dim, bias=bias),
    "rms": lambda dim, bias: nn.RMSNorm(dim, eps=1e-6),
}


@dataclass(kw_only=True)
class ForeignConfig:
    """Options that weights of other programs need; leave them alone for a model of one's own."""

    layer_scale: bool = False
    """A learned factor for each channel of a sublayer's output (CaiT's LayerScale), small at first."""
    reversible: bool = False
    """Two residual streams, each read by one kind of sublayer and added to by the other; their mean is the output
    (RevNet). Another function than one stream; memory is saved by checkpoint_activations, with or without it."""
    divide_max: bool = False
    """The output divided by its largest channel before the last norm (DALLE-pytorch's, CogView's advice for fp16)."""
    qkv_bias: bool = False
    """Biases of queries, keys and values."""
    rotate_values: bool = False
    """Rotary positions turn values as well as queries and keys (DALLE-pytorch)."""
    rotary: str = "grid"
    """Whose rotary angles: "grid" (ours) or "dalle_pytorch" (see attention.dalle_pytorch_angles)."""
    attn_semantics: str = "paper"
    """Whose definition of the attention patterns: "paper" or "dalle_pytorch" (see patterns.pattern_mask)."""
    head_bias: bool | None = None
    """Biases of the output heads; None = unless tied."""
    bos: bool = True
    """Begin with a learned <bos>; otherwise the first text token is not predicted."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            UserError: an unknown name of rotary angles; names it.
        """
        if self.rotary not in ROTARIES:
            raise UserError(f"rotary must be one of {', '.join(ROTARIES)}, got {self.rotary!r}")


@dataclass(kw_only=True)
class TransformerConfig:
    """Shape of a stack of blocks."""

    dim: int = 512
    """Model width."""
    depth: int = 6
    """Blocks, each attention then feed-forward."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Width of a head."""
    attn_dropout: float = 0.0
    """Dropout on the outputs of attention, in [0, 1)."""
    ff_dropout: float = 0.0
    """Dropout inside the feed-forward, in [0, 1)."""
    kv_heads: int | None = None
    """Heads of keys and values, each shared by neighbouring query heads (grouped-query attention); null = as many as
    heads. Sampling reads that much less."""
    ff_dim: int | None = None
    """Width inside the feed-forward; null = 4 dim."""
    gated: bool = True
    """Feed-forward gated by a second product (GEGLU), 3 dim ff_dim weights; false: one product, 2 dim ff_dim (the
    paper)."""
    activation: str = "gelu"
    """Of the feed-forward, "gelu" or "silu"; gated silu is SwiGLU."""
    norm: str = "layer"
    """"layer" or "rms" (RMSNorm: neither mean nor bias)."""
    bias: bool = True
    """Biases of linear layers and layer norms; those of queries, keys and values there are none of."""
    sandwich_norm: bool = False
    """A second norm after each sublayer (CogView), against activation growth."""
    stable: bool = False
    """Scores divided before the softmax (CogView's PB-relax), for fp16."""
    qk_norm: bool = False
    """RMS norm of queries and keys (Chameleon), against divergence at high learning rates."""
    shared_attn_ids: list[int] | None = None
    """Layers with the same id share attention weights; cycled over the depth; None = no sharing."""
    shared_ff_ids: list[int] | None = None
    """The same for the feed-forward."""
    checkpoint_activations: bool = False
    """Recompute each block in the backward pass: memory independent of depth but for one tensor a block."""
    gradient_scaling: bool = False
    """A gradient scale for each residual branch, for training in fp16; moved by gradient_scaling.update_scales."""
    foreign: ForeignConfig = field(default_factory=ForeignConfig)
    """Options that weights of other programs need."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        at_least_one(self, "dim", "depth", "heads", "head_dim", "kv_heads", "ff_dim")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise UserError(f"kv_heads ({self.kv_heads}) must be a divisor of heads ({self.heads})")
        for name, choices in (("activation", ACTIVATIONS), ("norm", NORMS)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("attn_dropout", "ff_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even (rotary positions turn pairs), got {self.head_dim}")
        for name in ("shared_attn_ids", "shared_ff_ids"):
            if getattr(self, name) is not None and not getattr(self, name):
                raise UserError(f"{name} is an empty list; leave it null for no sharing")


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, or three where it gates (GEGLU, SwiGLU).

    Args:
        config: ``dim``, ``ff_dim``, ``ff_dropout``, ``gated``, ``activation`` and ``bias`` of it.

    Source:
        Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.ff_dim or 4 * config.dim
        self.to_hidden = Linear(config.dim, (2 if config.gated else 1) * width, bias=config.bias)
        self.to_out = Linear(width, config.dim, bias=config.bias)
        self.dropout, self.gated, self.activation = config.ff_dropout, config.gated, ACTIVATIONS[config.activation]

    def forward(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b q d"]:
        """Same shape in and out."""
        hidden = self.to_hidden(x)
        if self.gated:
            value, gate = hidden.chunk(2, dim=-1)
            hidden = value * self.activation(gate)
        else:
            hidden = self.activation(hidden)
        return self.to_out(F.dropout(hidden, self.dropout) if self.training else hidden)


class LayerScale(nn.Module):
    """What follows a sublayer, and then a learned factor for each channel.

    Source:
        Touvron et al. 2021, https://arxiv.org/abs/2103.17239, section 3; first factors by depth as there.
    """

    def __init__(self, dim: int, depth: int, inner: nn.Module) -> None:
        super().__init__()
        start = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
        self.inner, self.factor = inner, nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b q d"]:
        """Same shape in and out."""
        return self.inner(x) * self.factor


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals."""

    def __init__(self, config: TransformerConfig, attention: Attention, feed_forward: FeedForward) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = make_norm(config), make_norm(config)
        self.attn_post, self.ff_post = _after(config), _after(config)
        self.attention, self.feed_forward = attention, feed_forward
        self.attn_scale = GradientScale() if config.gradient_scaling else None
        self.ff_scale = GradientScale() if config.gradient_scaling else None

    def attend(self, x: Float[Tensor, "b q d"], view: LayerView) -> Float[Tensor, "b q d"]:
        """What attention adds to the residual stream."""
        norm, attention, post = branch(self.attn_scale, x, self.attn_norm, self.attention, self.attn_post)
        return post(attention(view.shift(norm(x), 0), view))

    def feed(self, x: Float[Tensor, "b q d"], view: LayerView) -> Float[Tensor, "b q d"]:
        """What the feed-forward adds to the residual stream."""
        norm, feed_forward, post = branch(self.ff_scale, x, self.ff_norm, self.feed_forward, self.ff_post)
        return post(feed_forward(view.shift(norm(x), 1)))

    def forward(self, x: Float[Tensor, "b q d"], view: LayerView) -> Float[Tensor, "b q d"]:
        """One block over the positions that the view shows it."""
        x = x + self.attend(x, view)
        return x + self.feed(x, view)


class ReversibleBlock(Block):
    """A block of two residual streams: attention reads the second, the feed-forward the first.

    Source:
        Gomez et al. 2017, https://arxiv.org/abs/1707.04585, equation 6; which stream is read, and that both start
        alike, as in DALLE-pytorch 1.6.6, reversible.py.
    """

    def forward(self, x: Float[Tensor, "b q two_d"], view: LayerView) -> Float[Tensor, "b q two_d"]:
        """One block over both streams, side by side."""
        first, second = x.chunk(2, dim=-1)
        first = first + self.attend(second, view)
        second = second + self.feed(first, view)
        return torch.cat([first, second], dim=-1)


class Transformer(nn.Module):
    """A stack of blocks and a final norm.

    Args:
        config: shape of the stack.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        attentions: dict[int, Attention] = {}
        feed_forwards: dict[int, FeedForward] = {}
        blocks = []
        for layer in range(config.depth):
            attn_id = shared_id(config.shared_attn_ids, layer)
            ff_id = shared_id(config.shared_ff_ids, layer)
            if attn_id not in attentions:
                attentions[attn_id] = Attention(
                    config.dim,
                    config.heads,
                    config.head_dim,
                    dropout=config.attn_dropout,
                    stable=config.stable,
                    qk_norm=config.qk_norm,
                    qkv_bias=config.foreign.qkv_bias,
                    rotate_values=config.foreign.rotate_values,
                    kv_heads=config.kv_heads,
                    bias=config.bias,
                )
            if ff_id not in feed_forwards:
                feed_forwards[ff_id] = FeedForward(config)
            block = ReversibleBlock if config.foreign.reversible else Block
            blocks.append(block(config, attentions[attn_id], feed_forwards[ff_id]))
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config)

    def forward(self, x: Float[Tensor, "b q d"], views: Sequence[LayerView]) -> Float[Tensor, "b q d"]:
        """Run the stack; ``views`` says for each layer what it sees."""
        if self.config.foreign.reversible:
            x = torch.cat([x, x], dim=-1)
        for block, view in zip(self.blocks, views, strict=True):
            if self.config.checkpoint_activations and self.training:
                x = checkpoint(block, x, view, use_reentrant=False)
            else:
                x = block(x, view)
        if self.config.foreign.reversible:
            first, second = x.chunk(2, dim=-1)
            x = (first + second) / 2
        if self.config.foreign.divide_max:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        return self.norm(x)


def make_norm(config: TransformerConfig) -> nn.Module:
    """A norm of the model's width."""
    return NORMS[config.norm](config.dim, config.bias)


def _after(config: TransformerConfig) -> nn.Module:
    """What follows a sublayer."""
    norm = make_norm(config) if config.sandwich_norm else nn.Identity()
    return LayerScale(config.dim, config.depth, norm) if config.foreign.layer_scale else norm


def branch(
    scale: GradientScale | None, x: Float[Tensor, "b q d"], norm: nn.Module, sublayer: nn.Module, post: nn.Module
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """The modules of a residual branch, with scaled gradients where the model has scales and gradients are taken."""
    if scale is None or not torch.is_grad_enabled():
        return norm, sublayer, post
    return scale.branch(x.dtype, norm, sublayer, post)


def shared_id(ids: list[int] | None, layer: int) -> int:
    """Weight id of a layer: its own number, or the list cycled over the depth."""
    return layer if ids is None else ids[layer % len(ids)]
