"""What fp16 does to a deep DALLE's gradients: its backward pass rounded to 16 bits, with and without scales.

Simulated: the activation gradients inside residual branches are rounded to the format and back where automatic mixed
precision has them in 16 bits, namely at the output and the input of each linear layer of attention and feed-forward.
Rounding flushes what is too small to zero and turns what is too large into infinity, as casts do. Residual stream,
norms, embeddings and output heads keep fp32, as in the paper's figure 4. Not simulated: the forward pass and the
weights' gradients (fp32 products of rounded factors), and what attention and GELU do in 16 bits between the linear
layers.

Source:
    Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, section 2.4, figures 4 and 12, appendix D.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.dalle import DALLE, DALLEConfig
from dalle_pytorch.models.gradient_scaling import UNIT, GradientScale, update_scales
from dalle_pytorch.models.linear import Linear
from dalle_pytorch.training.optim import OptimConfig, make_optimizer
from dalle_pytorch.training.schedules import lr_factor
from replication import cached, dalles
from replication.arms import Curve, Job, Result, settings_of

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SCALINGS = ("none", "global", "block")
FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 50
"""Of the global scale. The first is torch's; it doubles after so many updates without overflow, torch's 2,000 being
longer than the training."""
EVERY = 10
"""Steps from one that is counted to the next."""


@dataclass
class UnderflowConfig:
    """Settings of an arm."""

    format: str = "fp16"
    """Of activation gradients: "fp16", "bf16", or "fp32" for no rounding."""
    scaling: str = "none"
    """"none", "global" (one dynamic scale of the loss) or "block" (the model's gradient_scaling)."""
    loss_divisor: float = 1.0
    """The loss is divided by it, and the weights' gradients are multiplied again: as where so many processes share a
    batch and each divides its loss by all of it (the paper's 1,024 GPUs, appendix D)."""
    dim: int = 32
    """Width of the DALLE."""
    depth: int = 24
    """Blocks."""
    batch_size: int = 8
    """Pictures of a step."""
    steps: int = 300
    """Of training."""
    lr: float = 3e-3
    """Highest learning rate."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: an unknown format or scaling, or a divisor that is not above 0; names it.
        """
        if self.format not in FORMATS:
            raise UserError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.scaling not in SCALINGS:
            raise UserError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        if self.loss_divisor <= 0:
            raise UserError(f"loss_divisor must be above 0, got {self.loss_divisor}")


@dataclass
class Count:
    """What happened to the activation gradients of a block."""

    values: int = 0
    """Finite, not zero, before rounding."""
    flushed: int = 0
    """Of these, zero after it."""
    squares: float = 0.0
    """Sum of their squares before rounding."""
    on: bool = True
    """Whether it counts."""

    def add(self, gradient: Float[Tensor, "..."], rounded: Float[Tensor, "..."]) -> None:
        """Count a gradient."""
        seen = gradient.isfinite() & (gradient != 0)
        self.values += int(seen.sum())
        self.flushed += int((seen & (rounded == 0)).sum())
        self.squares += gradient[seen].square().sum(dtype=torch.float64).item()


class _Rounded(torch.autograd.Function):
    """The identity; its gradient goes through another format and is counted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, count: Count) -> Tensor:
        """``x``."""
        ctx.dtype, ctx.count = dtype, count
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """To the format and back."""
        rounded = gradient.to(ctx.dtype).to(gradient.dtype)
        if ctx.count.on:
            ctx.count.add(gradient, rounded)
        return rounded, None, None


def round_gradients(blocks: Sequence[nn.Module], dtype: torch.dtype) -> list[Count]:
    """From now on the linear layers of the blocks pass rounded gradients on; a count for each block."""
    counts = [Count() for _ in blocks]
    for block, count in zip(blocks, counts, strict=True):
        for module in block.modules():
            if isinstance(module, Linear):
                _round_gradients(module, dtype, count)
    return counts


def _round_gradients(layer: nn.Module, dtype: torch.dtype, count: Count) -> None:
    def entering(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (_Rounded.apply(inputs[0], dtype, count),)

    def leaving(_: nn.Module, __: tuple[Tensor, ...], output: Float[Tensor, "..."]) -> Tensor:
        return _Rounded.apply(output, dtype, count)

    layer.register_forward_pre_hook(entering)
    layer.register_forward_hook(leaving)


prepare = dalles.prepare


def run(job: Job) -> Result:
    """Train; the share of flushed values, training loss, nats of held-out pairs, skipped steps."""
    config = settings_of(UnderflowConfig, job.settings)
    material = cached.open_cached(job.shared, batch_size=config.batch_size, seed=job.seed)
    dalle = cached.make_dalle(material, sizes(config, material.vocab_size), job.seed)
    counts = round_gradients(list(dalle.transformer.blocks), FORMATS[config.format])
    training = Training(dalle, config, job.seed)
    losses = []
    for step, batch in enumerate(cached.batches(material, config.steps)):
        for count in counts:
            count.on = step % EVERY == 0
        losses.append(training.step(batch["text_tokens"], batch["image_tokens"]))
    last = losses[-max(1, config.steps // 10) :]
    values, flushed = sum(count.values for count in counts), sum(count.flushed for count in counts)
    numbers = {
        "flushed": 100 * flushed / values,
        "loss": sum(last) / len(last),
        "skipped": float(training.skipped),
        **cached.held_out(dalle, material),
    }
    blocks = list(range(1, config.depth + 1))
    curves = {
        "flushed, % (by block)": Curve(blocks, [100 * count.flushed / count.values for count in counts]),
        "log2 of the gradients' rms (by block)": Curve(
            blocks, [math.log2(count.squares / count.values) / 2 for count in counts]
        ),
        "log2 of the scale at the end (by block)": Curve(blocks, training.scales()),
        "training loss (by step)": cached.over_steps(losses),
    }
    return Result(numbers, curves)


def sizes(config: UnderflowConfig, vocab_size: int) -> DALLEConfig:
    """Deep and narrow, two heads."""
    return DALLEConfig(
        dim=config.dim, depth=config.depth, heads=2, head_dim=config.dim // 2, token_dropout=0.1,
        gradient_scaling=config.scaling == "block", text_len=cached.TEXT_LEN, text_vocab_size=vocab_size,
    )  # fmt: skip


class Training:
    """Steps of a DALLE with scaled gradients.

    Args:
        dalle: in training mode.
        config: scaling and rates.
        seed: of the dropout of tokens.
    """

    def __init__(self, dalle: DALLE, config: UnderflowConfig, seed: int) -> None:
        self.dalle, self.config = dalle, config
        self.optim = OptimConfig(lr=config.lr, warmup_steps=config.steps // 10)
        self.optimizer = make_optimizer(dalle, self.optim, fused=False)  # the global scale's rule
        self.scale = torch.amp.GradScaler(
            "cpu", FIRST_SCALE, growth_interval=GROWTH_INTERVAL, enabled=config.scaling == "global"
        )
        self.weights = [p for p in dalle.parameters() if p.requires_grad]
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = self.skipped = 0
        """Steps taken; updates that were left out, because a gradient was not finite."""

    def step(self, text_tokens: Tensor, image_tokens: Tensor) -> float:
        """An update; the loss before it."""
        self.optimizer.zero_grad()
        loss = self.dalle.loss(text_tokens, image_tokens, generator=self.generator).loss
        self.scale.scale(loss / self.config.loss_divisor).backward()
        self.scale.unscale_(self.optimizer)
        for weight in self.weights:
            assert weight.grad is not None
            weight.grad *= self.config.loss_divisor
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.optim.clip)
        overflown = update_scales(self.dalle)  # of the branches, which filter their own
        if overflown or not norm.isfinite():
            self.skipped += 1
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            self.scale.step(self.optimizer)
        self.scale.update()
        self.steps += 1
        return loss.item()

    def rate(self) -> float:
        """Learning rate of the current step; skipped ones count."""
        optim = self.optim
        return optim.lr * lr_factor(
            self.steps, total_steps=self.config.steps, warmup_steps=optim.warmup_steps, schedule=optim.schedule,
            min_ratio=optim.lr_min_ratio,
        )  # fmt: skip

    def scales(self) -> list[float]:
        """Binary logarithm of each block's scale, the mean of its two branches; relative to the loss."""
        blocks = self.dalle.transformer.blocks
        if self.config.scaling == "block":
            branches = [[m for m in block.modules() if isinstance(m, GradientScale)] for block in blocks]
            return [sum(int(scale.exponent) for scale in two) / UNIT / len(two) for two in branches]
        return [math.log2(self.scale.get_scale())] * len(blocks)  # 1 where it is off
