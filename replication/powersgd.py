"""PowerSGD in one process: a DALLE whose workers send each other narrow matrices in place of gradients.

Each step every worker has its own part of the batch, and so its own gradient and its own carried error. The arithmetic
is that of torch's hook, which training with ``trainer=powersgd`` uses; as in the paper only the transformer's matrices
are compressed, embeddings, output heads and vectors are averaged as they are. Not simulated: the paper's 1-6-9 numbers
(all is fp32), its Householder reflections (QR here) and its shards, eight to a matrix (whole matrices here).

Source:
    Vogels et al. 2019, https://arxiv.org/abs/1905.13727, algorithm 1 and 2; Ramesh et al. 2021, section 2.5 and
    appendix E.

Axes: w workers, n m rows and columns of a matrix, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.data.batches import Batch
from dalle_pytorch.errors import UserError, not_negative
from dalle_pytorch.models.dalle import DALLE, DALLEConfig
from dalle_pytorch.training.optim import OptimConfig, inner_matrices, make_optimizer, make_scheduler
from replication import cached, dalles
from replication.arms import Job, Result, settings_of

POLICIES = ("warm", "fixed", "resampled")
LAST = 50
"""Steps whose mean is the training loss at the end."""


@dataclass
class PowerSGDConfig:
    """Settings of an arm."""

    rank: int = 0
    """Columns of the narrow matrices; 0 = gradients are averaged as they are."""
    policy: str = "warm"
    """Where Q comes from in each step: "warm" (from the step before), "fixed" (drawn once) or "resampled"."""
    feedback: bool = True
    """Add to each gradient what compression lost of the one before."""
    workers: int = 4
    """That share a batch."""
    dim: int = 64
    """Width of the DALLE; its heads are 32 wide."""
    depth: int = 2
    """Blocks."""
    batch_size: int = 32
    """Pictures of a step, of all workers."""
    steps: int = 250
    """Of training."""
    lr: float = 3e-3
    """Highest learning rate."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: an unknown policy, a negative rank, or a batch that the workers cannot share; names the values.
        """
        if self.policy not in POLICIES:
            raise UserError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        not_negative(self, "rank")
        if self.workers < 1 or self.batch_size % self.workers:
            raise UserError(f"batch_size ({self.batch_size}) must be a multiple of workers ({self.workers})")


class PowerSGD:
    """Averages gradients of workers matrix by matrix, and carries the errors on.

    Args:
        rank: columns of the narrow matrices.
        seed: of the random ones.
        policy: one of POLICIES.
        feedback: whether errors are carried on.
    """

    def __init__(self, rank: int, seed: int, *, policy: str = "warm", feedback: bool = True) -> None:
        self.rank, self.policy, self.feedback = rank, policy, feedback
        self.generator = torch.Generator().manual_seed(seed)
        self.q: dict[str, Float[Tensor, "m r"]] = {}
        """By name of the matrix: where the next step starts."""
        self.errors: dict[str, Float[Tensor, "w n m"]] = {}
        """By name of the matrix: what of each worker's gradients was not sent yet."""

    def average(self, name: str, gradients: Float[Tensor, "w n m"]) -> Float[Tensor, "n m"]:
        """What all workers get in place of the mean; the mean itself of a matrix that compression would not shrink."""
        rows, columns = gradients.shape[1:]
        rank = min(rows, columns, self.rank)
        if not shrinks(rows, columns, rank):
            return gradients.mean(dim=0)
        if self.feedback and name in self.errors:
            gradients = gradients + self.errors[name]
        p = orthonormal((gradients @ self._start(name, columns, rank)).mean(dim=0))
        q = (gradients.mT @ p).mean(dim=0)
        average = p @ q.mT
        if self.policy == "warm":
            self.q[name] = q
        if self.feedback:
            self.errors[name] = gradients - average
        return average

    def _start(self, name: str, columns: int, rank: int) -> Float[Tensor, "m r"]:
        if name not in self.q or self.policy == "resampled":
            self.q[name] = torch.randn(columns, rank, generator=self.generator)
        return orthonormal(self.q[name])


def orthonormal(matrix: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Columns that span the same space, at right angles and of length 1."""
    return torch.linalg.qr(matrix).Q


def shrinks(rows: int, columns: int, rank: int) -> bool:
    """Whether the two narrow matrices hold fewer numbers than the matrix."""
    return (rows + columns) * rank < rows * columns


def sent(matrices: Sequence[Tensor], rank: int) -> tuple[int, int]:
    """Numbers that a worker sends for matrices in a step, compressed and as they are."""
    whole = sum(matrix.numel() for matrix in matrices)
    narrow = 0
    for matrix in matrices:
        rows, columns = matrix.shape
        least = min(rows, columns, rank)
        narrow += (rows + columns) * least if rank and shrinks(rows, columns, least) else matrix.numel()
    return narrow, whole


prepare = dalles.prepare


def run(job: Job) -> Result:
    """Train; nats of held-out pairs, training loss, what was sent, and how far the averages are from the means."""
    config = settings_of(PowerSGDConfig, job.settings)
    material = cached.open_cached(job.shared, batch_size=config.batch_size, seed=job.seed)
    dalle = cached.make_dalle(material, sizes(config, material.vocab_size), job.seed)
    optim = OptimConfig(lr=config.lr, warmup_steps=config.steps // 10)
    optimizer = make_optimizer(dalle, optim)
    scheduler = make_scheduler(optimizer, optim, config.steps)
    inner = {id(p) for p in inner_matrices(dalle)}
    weights = {name: p for name, p in dalle.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in weights.items() if id(p) in inner}
    compressor = PowerSGD(config.rank, job.seed, policy=config.policy, feedback=config.feedback)
    generator, losses, errors = torch.Generator().manual_seed(job.seed), [], []
    for batch in cached.batches(material, config.steps):
        loss, gradients = worker_gradients(dalle, weights, batch, config.workers, generator)
        for name, parameter in weights.items():
            compressed = config.rank and name in matrices
            parameter.grad = compressor.average(name, gradients[name]) if compressed else gradients[name].mean(dim=0)
        errors.append(distance(matrices, gradients))
        losses.append(loss)
        torch.nn.utils.clip_grad_norm_(list(weights.values()), optim.clip)
        optimizer.step()
        scheduler.step()
    narrow, whole = sent(list(matrices.values()), config.rank)
    numbers = {
        **cached.held_out(dalle, material),
        "loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "error": sum(errors) / len(errors),
        "saved": 100 * (1 - narrow / whole),
        "saved_paper": 100 * (1 - 5 * config.rank / (8 * config.dim)) if config.rank else 0.0,
    }
    return Result(numbers, {"training loss": cached.over_steps(losses), "error": cached.over_steps(errors)})


def sizes(config: PowerSGDConfig, vocab_size: int) -> DALLEConfig:
    """The DALLE of experiment=replicate, but for its size."""
    return DALLEConfig(
        dim=config.dim, depth=config.depth, heads=max(1, config.dim // 32), head_dim=32, qk_norm=True,
        token_dropout=0.1, text_len=cached.TEXT_LEN, text_vocab_size=vocab_size,
    )  # fmt: skip


def worker_gradients(
    dalle: DALLE, weights: Mapping[str, nn.Parameter], batch: Batch, workers: int, generator: torch.Generator
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch, mean over workers, and each worker's gradients of its part, stacked by name."""
    parts = zip(batch["text_tokens"].chunk(workers), batch["image_tokens"].chunk(workers), strict=True)
    losses = [dalle.loss(text, image, generator=generator).loss for text, image in parts]
    each = [torch.autograd.grad(loss, list(weights.values())) for loss in losses]
    stacked = {name: torch.stack(rows) for name, rows in zip(weights, zip(*each, strict=True), strict=True)}
    return sum(loss.item() for loss in losses) / workers, stacked


def distance(matrices: Mapping[str, nn.Parameter], gradients: Mapping[str, Tensor]) -> float:
    """Of all averages, in ``grad``, together from the means over workers, over the norm of these means."""
    apart, norm = 0.0, 0.0
    for name, parameter in matrices.items():
        mean = gradients[name].mean(dim=0)
        assert parameter.grad is not None
        apart += (parameter.grad - mean).square().sum().item()
        norm += mean.square().sum().item()
    return (apart / norm) ** 0.5
