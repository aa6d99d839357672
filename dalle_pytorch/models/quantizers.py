"""Between encoder and decoder: vectors to the nearest codes, with gradients in spite of it.

VectorQuantize and FSQ are those of vector-quantize-pytorch (MIT), behind the interface that VQVAE and VQGAN read. Their
import takes half a second, which every command would pay: so it is where they are used.

Axes: b batch, d codebook_dim, h w token grid, n = h * w in raster order, k codebook_size.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.errors import UserError, not_negative

SHARPNESS = 100.0
"""Entropies of ibq, lfq and bsq are of softmaxes so much sharper (the authors' temperature 0.01): over short vectors a
softmax is almost uniform, and then the entropy of all choices is high although one code is chosen everywhere."""

CODEBOOKS = ("ema", "fsq", "ibq", "lfq", "bsq")
"""Kinds of ``make_quantizer``."""
ACTIVATIONS = {"tanh": 1.0, "ifsq": 0.8}
"""Slopes at 0 of what bounds a coordinate of fsq."""

READ_BY = {
    "levels": ("fsq",),
    "activation": ("fsq",),
    "decay": ("ema",),
    "idle": ("ema",),
    "commitment": ("vq", "ema", "ibq", "lfq", "bsq"),
    "entropy": ("ibq", "lfq", "bsq"),
}
"""Kinds that read a setting; "vq" is VQGAN's own."""


@dataclass(kw_only=True)
class CodebookConfig:
    """Settings of all codebooks; each kind reads its own."""

    codebook_size: int
    quantizer: str
    levels: list[int] = field(default_factory=list)
    """fsq: levels of each coordinate, 5 or more best; ``codebook_size`` is their product."""
    activation: str = "tanh"
    """fsq: what bounds a coordinate, "tanh" as published, or that of "ifsq"."""
    decay: float = 0.99
    """ema: of the moving averages, in (0, 1)."""
    idle: float = 0.1
    """ema: codes that stand for fewer vectors of a batch, on average, are put on one of them."""
    commitment: float = 0.25
    """vq, ema, ibq, lfq, bsq: weight of the distance from the encoder's vectors to their codes."""
    entropy: float = 0.002
    """ibq, lfq, bsq: weight of sure choices and of all codes in use (authors of ibq: 0.05, beside larger losses than an
    image's error; docs/experiments.md)."""

    def check_codebook(self) -> None:
        """Fill ``codebook_size`` of a grid, and validate.

        Raises:
            UserError: a field is out of range, or is of another kind of codebook; names it.
        """
        defaults = {item.name: item for item in fields(CodebookConfig)}
        for name, kinds in READ_BY.items():
            item = defaults[name]
            default = item.default_factory() if callable(item.default_factory) else item.default
            if self.quantizer not in kinds and getattr(self, name) != default:
                raise UserError(
                    f"{name} is a setting of quantizer={' or '.join(kinds)}, and this is {self.quantizer}: leave it out"
                )
        if self.quantizer == "fsq":
            if not self.levels or min(self.levels) < 3:
                raise UserError(
                    f"levels must be 3 or more each, e.g. [8,5,5,5] for 1,000 codes; got {list(self.levels)}"
                )
            size = math.prod(self.levels)
            if self.codebook_size not in (0, size):
                raise UserError(
                    f"levels {list(self.levels)} make {size} codes, and codebook_size is {self.codebook_size}: set "
                    "codebook_size=0, which is filled from them"
                )
            self.codebook_size = size
        if self.quantizer in ("lfq", "bsq") and (self.codebook_size < 2 or self.codebook_size.bit_count() != 1):
            raise UserError(f"codebook_size must be a power of 2 with {self.quantizer}, got {self.codebook_size}")
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not 0 < self.decay < 1:
            raise UserError(f"decay must lie in (0, 1), got {self.decay}")
        not_negative(self, "idle", "commitment", "entropy")


class Quantized(NamedTuple):
    """Codes of a batch."""

    vectors: Float[Tensor, "b n d"]
    """Of the codes, with a gradient for the encoder."""
    image_tokens: Int[Tensor, "b n"]
    loss: Float[Tensor, ""]
    """What the quantiser itself wants minimised; 0 outside training."""


class Quantizer(nn.Module, ABC):
    """Vectors to codes and back."""

    @abstractmethod
    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """The codes of vectors. In training mode a codebook may learn from them."""

    @abstractmethod
    def vectors(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The codes' vectors."""

    def share(self) -> None:
        """Learn from the batches of all processes from now on; what learns by gradients does so anyway."""
        return


class NearestCode(Quantizer):
    """The nearest of learnt vectors, which follow the mean of what they stand for; idle ones move to where data is.

    Args:
        codebook_size: number of codes.
        dim: width of a vector.
        decay: of the moving averages.
        commitment: weight of the distance from vectors to their codes.
        idle: codes whose moving count is below are put on a vector of the batch.

    Source:
        van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, appendix A.1 for the averages; vectors of unit
        length and few dimensions: Yu et al. 2021, https://arxiv.org/abs/2110.04627, section 3.2.
    """

    def __init__(self, codebook_size: int, dim: int, *, decay: float, commitment: float, idle: float) -> None:
        from vector_quantize_pytorch import VectorQuantize

        super().__init__()
        self.shared = False
        self.codes = VectorQuantize(
            dim, codebook_size, decay=decay, commitment_weight=commitment, threshold_ema_dead_code=idle,
            use_cosine_sim=True, rotation_trick=False, sync_codebook=False,
        )  # fmt: skip

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """The codes of vectors; in training mode the codebook follows them."""
        vectors, tokens, loss = self.codes(z, freeze_codebook=self.training and not self._all_finite(z))
        return Quantized(vectors, tokens, loss.squeeze())

    def _all_finite(self, z: Float[Tensor, "b n d"]) -> bool:
        """Whether a step's vectors are finite, of all processes that learn one codebook, or one would wait for another.

        A batch that is not finite would leave no code finite; its step is left out, and so are its averages.
        """
        finite = z.isfinite().all().int()
        if self.shared:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return bool(finite)

    def share(self) -> None:
        """Follow the vectors of all processes. Codes that each of them moves are the first's, as DDP has buffers."""
        self.shared = True
        self.codes._codebook.all_reduce_fn = torch.distributed.all_reduce

    def vectors(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The codes' vectors, of unit length."""
        return self.codes.get_codes_from_indices(image_tokens)


class ScalarGrid(Quantizer):
    """Every coordinate of a short vector is rounded to one of a few levels: nothing to learn, nothing to keep alive.

    Args:
        levels: of each coordinate; the codebook has as many codes as their product.
        dim: width of the vectors, projected to and from ``len(levels)`` coordinates.
        slope: of the tanh that bounds a coordinate, at 0: 1 as in FSQ; 0.8 as in iFSQ (which writes it as
            2 sigmoid(1.6 x) - 1), where a normal coordinate becomes uniform.

    Source:
        Mentzer et al. 2023 (FSQ), https://arxiv.org/abs/2309.15505; levels of common sizes in its appendix A.4.1.
        iFSQ: https://arxiv.org/abs/2601.17124.
    """

    def __init__(self, levels: list[int], dim: int, *, slope: float = 1.0) -> None:
        from vector_quantize_pytorch import FSQ

        super().__init__()
        self.slope = slope
        with torch.device("cpu"):  # it reads its own table, which has no numbers on a plan's meta device
            self.grid = FSQ(list(levels), dim=dim)

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """The codes of vectors."""
        codes = self.grid.quantize(self.slope * self.grid.project_in(z).float())
        tokens = self.grid.codes_to_indices(codes)
        return Quantized(self.grid.project_out(codes.to(z.dtype)), tokens.long(), z.new_zeros(()))

    def vectors(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The codes' vectors."""
        codes = self.grid.implicit_codebook[image_tokens]
        like = next(self.grid.project_out.parameters(), codes)  # none where a vector has as many coordinates
        return self.grid.project_out(codes.to(like.dtype))


class LikeliestCode(Quantizer):
    """The likeliest code under a softmax over all, whose gradient reaches every code.

    Args:
        codebook_size: number of codes.
        dim: width of a vector.
        commitment: weight of the distance from vectors to their codes.
        entropy: weight of the entropy of each choice less that of all choices together, which keeps codes in use.

    Source:
        Shi et al. 2024 (IBQ), https://arxiv.org/abs/2412.02692, section 3.2; the entropy term: Yu et al. 2023
        (MAGVIT-v2), https://arxiv.org/abs/2310.05737, section 3.1. Deviations: distances as in VQ-VAE (codes follow
        vectors, vectors are held to codes by ``commitment``), where the authors let both follow in one term more and
        weigh the codes' side; codes begin with unit length, where theirs begin near 0.
    """

    def __init__(self, codebook_size: int, dim: int, *, commitment: float, entropy: float) -> None:
        super().__init__()
        self.commitment, self.entropy = commitment, entropy
        self.codes = nn.Parameter(torch.randn(codebook_size, dim) / math.sqrt(dim))  # of unit length or so

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """The codes of vectors."""
        logits = z @ self.codes.T
        tokens = logits.argmax(dim=-1)
        if not self.training:
            return Quantized(self.vectors(tokens), tokens, z.new_zeros(()))
        p = logits.softmax(dim=-1)
        vectors = (F.one_hot(tokens, len(self.codes)) - p.detach() + p) @ self.codes
        distance = F.mse_loss(vectors, z.detach()) + self.commitment * F.mse_loss(z, vectors.detach())
        return Quantized(vectors, tokens, distance + self.entropy * choice_entropy(logits))

    def vectors(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The codes' vectors."""
        return self.codes[image_tokens]


class SignBits(Quantizer):
    """Every coordinate of a short vector is reduced to its sign: a code of as many bits.

    Args:
        codebook_size: number of codes, a power of 2.
        dim: width of the vectors, projected to and from ``log2(codebook_size)`` coordinates.
        spherical: put vectors on the unit sphere first (BSQ).
        commitment: weight of the distance from vectors to their codes.
        entropy: weight of the entropy of each choice less that of all choices together, which keeps codes in use.

    Source:
        Yu et al. 2023 (LFQ), https://arxiv.org/abs/2310.05737, section 3.1; Zhao et al. 2024 (BSQ),
        https://arxiv.org/abs/2406.07548, section 3.2. (The LFQ of vector-quantize-pytorch 1.32 divides the entropy of
        all choices by the number of processes.)
    """

    table: Tensor

    def __init__(self, codebook_size: int, dim: int, *, spherical: bool, commitment: float, entropy: float) -> None:
        super().__init__()
        self.spherical, self.commitment, self.entropy = spherical, commitment, entropy
        bits = codebook_size.bit_length() - 1
        self.project_in, self.project_out = nn.Linear(dim, bits), nn.Linear(bits, dim)
        signs = 2 * (torch.arange(codebook_size)[:, None] >> torch.arange(bits) & 1) - 1
        self.register_buffer("table", signs / bits**0.5 if spherical else signs.float(), persistent=False)

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """The codes of vectors."""
        z = self.project_in(z)
        z = F.normalize(z, dim=-1) if self.spherical else z
        tokens = ((z > 0).long() << torch.arange(z.shape[-1], device=z.device)).sum(dim=-1)
        codes = self.table[tokens].to(z.dtype)
        vectors = self.project_out(z + (codes - z).detach())
        if not self.training:
            return Quantized(vectors, tokens, z.new_zeros(()))
        loss = self.commitment * F.mse_loss(z, codes)
        return Quantized(vectors, tokens, loss + self.entropy * choice_entropy(2 * z @ self.table.T.to(z.dtype)))

    def vectors(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The codes' vectors."""
        return self.project_out(self.table[image_tokens].to(self.project_out.weight.dtype))


def choice_entropy(logits: Float[Tensor, "b n k"]) -> Float[Tensor, ""]:
    """Mean entropy of each choice among codes less that of all choices of the batch together, in nats."""
    log_sharp = (SHARPNESS * logits).log_softmax(dim=-1)
    sharp = log_sharp.exp()
    of_each = -(sharp * log_sharp).sum(dim=-1).mean()
    share = sharp.mean(dim=(0, 1)).clamp_min(1e-20)  # the entropy's slope at 0 is infinite
    return of_each - torch.special.entr(share).sum()


def make_quantizer(config: CodebookConfig, dim: int) -> Quantizer:
    """The quantiser of a config, one of CODEBOOKS, for vectors of a width."""
    size, commitment, entropy = config.codebook_size, config.commitment, config.entropy
    if config.quantizer == "ema":
        return NearestCode(size, dim, decay=config.decay, commitment=commitment, idle=config.idle)
    if config.quantizer == "fsq":
        return ScalarGrid(config.levels, dim, slope=ACTIVATIONS[config.activation])
    if config.quantizer == "ibq":
        return LikeliestCode(size, dim, commitment=commitment, entropy=entropy)
    return SignBits(size, dim, spherical=config.quantizer == "bsq", commitment=commitment, entropy=entropy)


def gumbel_softmax(
    logits: Float[Tensor, "b k h w"],
    tau: float,
    generator: torch.Generator | None,
    *,
    straight_through: bool = False,
    reinmax: bool = False,
) -> Float[Tensor, "b k h w"]:
    """A sample of the codes: soft, or one-hot with a straight-through gradient.

    Args:
        logits: of codes.
        tau: temperature.
        generator: source of the noise; None = torch's global one.
        straight_through: one-hot forward, soft backward.
        reinmax: with a gradient of second order (Liu et al. 2023, https://arxiv.org/abs/2304.08612, algorithm 2).

    Raises:
        ValueError: tau is not above 0.
    """
    if tau <= 0:
        raise ValueError(f"gumbel_tau must be above 0, got {tau}")
    noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min(1e-20).log().neg()
    soft = ((logits + noise) / tau).softmax(dim=1)
    if not straight_through:
        return soft
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    if not reinmax:
        return hard + soft - soft.detach()
    # Heun's step between the prior and the sample
    prior = logits.softmax(dim=1)
    halfway = (hard + (logits / tau).softmax(dim=1)) / 2
    shifted = ((halfway.clamp_min(1e-20).log() - logits).detach() + logits).softmax(dim=1)
    surrogate = 2 * shifted - 0.5 * prior
    return hard + surrogate - surrogate.detach()


class LogitsLoss(NamedTuple):
    """What Gumbel-softmax codes add to the loss."""

    kl: Float[Tensor, ""]
    """KL(q || uniform) in nats, summed over positions, per subpixel."""
    usage: Float[Tensor, ""]
    """KL(mean q || uniform) in nats: 0 = the batch uses all codes alike, ln codebook_size = one code only."""


def logits_loss(logits: Float[Tensor, "b k h w"], subpixels: int) -> LogitsLoss:
    """How far code distributions are from uniform ones.

    Args:
        logits: of codes.
        subpixels: of the batch, so that the KL has the unit of the reconstruction error.
    """
    # KL of the categorical at temperature 1, whatever gumbel_tau (the author, openai/DALL-E issue 26)
    log_q = logits.log_softmax(dim=1)
    q = log_q.exp()
    uniform = math.log(logits.shape[1])
    return LogitsLoss(
        (q * (log_q + uniform)).sum() / subpixels, uniform - torch.special.entr(q.mean(dim=(0, 2, 3))).sum()
    )


def to_sequence(x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b n d"]:
    """A grid of vectors in raster order."""
    return rearrange(x, "b d h w -> b (h w) d")


def to_grid(x: Float[Tensor, "b n d"], grid_size: int) -> Float[Tensor, "b d h w"]:
    """Vectors in raster order as a grid."""
    return rearrange(x, "b (h w) d -> b d h w", h=grid_size)
