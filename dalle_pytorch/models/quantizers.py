"""Between encoder and decoder: vectors to the nearest codes, with gradients in spite of it.

VectorQuantize and FSQ are those of vector-quantize-pytorch (MIT), behind the interface that VQVAE reads. Their import
takes half a second, which every command would pay: so it is where they are used.

Axes: b batch, d codebook_dim, h w token grid, n = h * w in raster order, k codebook_size.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

SHARPNESS = 100.0
"""IBQ's entropies are of softmaxes so much sharper (its authors' temperature 0.01): over short vectors a softmax is
almost uniform, and then the entropy of all choices is high although one code is chosen everywhere."""


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

    Source:
        Mentzer et al. 2023 (FSQ), https://arxiv.org/abs/2309.15505; levels of common sizes in its appendix A.4.1.
    """

    def __init__(self, levels: list[int], dim: int) -> None:
        from vector_quantize_pytorch import FSQ

        super().__init__()
        with torch.device("cpu"):  # it reads its own table, which has no numbers on a plan's meta device
            self.grid = FSQ(list(levels), dim=dim)

    def forward(self, z: Float[Tensor, "b n d"]) -> Quantized:
        """The codes of vectors."""
        vectors, tokens = self.grid(z)
        return Quantized(vectors, tokens.long(), z.new_zeros(()))

    def vectors(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The codes' vectors."""
        return self.grid.indices_to_codes(image_tokens)


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
        p, log_sharp = logits.softmax(dim=-1), (SHARPNESS * logits).log_softmax(dim=-1)
        sharp = log_sharp.exp()
        vectors = (F.one_hot(tokens, len(self.codes)) - p.detach() + p) @ self.codes
        distance = F.mse_loss(vectors, z.detach()) + self.commitment * F.mse_loss(z, vectors.detach())
        of_each = -(sharp * log_sharp).sum(dim=-1).mean()
        of_all = torch.special.entr(sharp.mean(dim=(0, 1))).sum()
        return Quantized(vectors, tokens, distance + self.entropy * (of_each - of_all))

    def vectors(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The codes' vectors."""
        return self.codes[image_tokens]


def to_sequence(x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b n d"]:
    """A grid of vectors in raster order."""
    return rearrange(x, "b d h w -> b (h w) d")


def to_grid(x: Float[Tensor, "b n d"], grid_size: int) -> Float[Tensor, "b d h w"]:
    """Vectors in raster order as a grid."""
    return rearrange(x, "b (h w) d -> b d h w", h=grid_size)
