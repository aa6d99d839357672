"""DiscreteVAE: stage one, a codebook of picture tokens learnt with the Gumbel-softmax relaxation.

Paper: Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, sections 2.1, A.2 and A.3.
The layers are in conv_tokenizer.py.

Axes: b batch, c channels, H W pixels, h w token grid, n = h * w, k codebook_size, d codebook_dim.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.errors import UserError
from dalle_pytorch.models.conv_tokenizer import ConvConfig, ConvTokenizer
from dalle_pytorch.models.image_tokenizer import NOT_RELAXED, Reconstruction, Relaxation
from dalle_pytorch.models.quantizers import gumbel_softmax, logits_loss


@dataclass(kw_only=True)
class DiscreteVAEConfig(ConvConfig):
    """Sizes and likelihood of a DiscreteVAE."""

    straight_through: bool = False
    """Hard one-hot codes forward, soft gradient backward; the paper trains soft."""
    reinmax: bool = False
    """Second-order straight-through gradient (https://arxiv.org/abs/2304.08612); needs straight_through."""
    gumbel_tau: float = 0.9
    """Temperature of calls in DALLE-pytorch's way that give none; our training has a schedule."""
    kl_weight: float = 0.0
    """Beta of calls in DALLE-pytorch's way; our training has a schedule."""

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ValueError: a field is out of range; names it.
        """
        super().__post_init__()
        if self.reinmax and not self.straight_through:
            raise UserError("reinmax corrects the straight-through gradient: set straight_through=true as well")
        if self.gumbel_tau <= 0:
            raise UserError(f"gumbel_tau must be above 0, got {self.gumbel_tau}")


class VAELoss(NamedTuple):
    """Loss of a batch; the scalars are per subpixel (b * c * H * W), so that batch and size do not matter."""

    loss: Float[Tensor, ""]
    """reconstruction + kl_weight * kl + usage_weight * usage."""
    reconstruction: Float[Tensor, ""]
    """Negative log-likelihood up to constants, in the units of ``config.likelihood``."""
    kl: Float[Tensor, ""]
    """KL(q || uniform) in nats, summed over positions, per subpixel."""
    usage: Float[Tensor, ""]
    """KL(mean q || uniform) in nats: 0 = the batch uses all codes alike, ln codebook_size = one code only."""
    image_tokens: Int[Tensor, "b n"]
    """Hard codes of the encoder, for codebook usage."""
    reconstructions: Float[Tensor, "b c H W"]
    """Pictures from the relaxed codes, in [0, 1]."""


class DiscreteVAE(ConvTokenizer):
    """Encoder to code logits, relaxed codes, decoder to pixels.

    Args:
        config: sizes and likelihood.

    Source:
        Ramesh et al. 2021, section 2.1. Deviation: strided convolutions in place of max-pooled bottleneck groups.
    """

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__(config, outputs=config.codebook_size)
        self.config = config
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.init_weights()

    def encode_logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        """Code logits of every grid position, from pictures in [0, 1]."""
        return self.encoded(images)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n"]:
        """Most likely code of every position; no Gumbel noise (section 2.2)."""
        with torch.autocast(images.device.type, enabled=False):  # the same codes in training as when cached or sampled
            return self.encode_logits(images).argmax(dim=1).flatten(1)

    def output(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b maps H W"]:
        """The decoder's output for tokens."""
        return self.decoded(rearrange(self.codebook(image_tokens), "b (h w) d -> b d h w", h=self.grid_size))

    def code_vectors(self) -> Float[Tensor, "k d"]:
        """Of all codes."""
        return self.codebook.weight

    def reconstruct(
        self,
        images: Float[Tensor, "b c H W"],
        relaxation: Relaxation = NOT_RELAXED,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Images through relaxed codes."""
        logits, output = self.relaxed(images, relaxation.gumbel_tau, generator)
        kl, usage = logits_loss(logits, images.numel())
        loss = relaxation.kl_weight * kl + relaxation.usage_weight * usage
        return Reconstruction(output, loss, {"kl": kl, "usage": usage}, logits.detach().argmax(dim=1).flatten(1))

    def relaxed(
        self, images: Float[Tensor, "b c H W"], gumbel_tau: float, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b maps H W"]]:
        """Code logits and the decoder's output for relaxed codes, with gradients.

        Raises:
            ValueError: images of another shape, or gumbel_tau not above 0.
        """
        logits = self.encode_logits(images).float()
        config = self.config
        codes = gumbel_softmax(
            logits, gumbel_tau, generator, straight_through=config.straight_through, reinmax=config.reinmax
        )
        return logits, self.decoded(torch.einsum("bkhw,kd->bdhw", codes, self.codebook.weight)).float()

    def loss(
        self,
        images: Float[Tensor, "b c H W"],
        *,
        gumbel_tau: float,
        kl_weight: float,
        usage_weight: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> VAELoss:
        """Negative evidence lower bound of a batch.

        Args:
            images: pictures in [0, 1].
            gumbel_tau: temperature of the relaxation, above 0.
            kl_weight: the paper's beta; 1 is the bound for logit_laplace, larger spreads the codes.
            usage_weight: pull towards using all codes alike over the batch; the paper has none. It keeps codes alive in
                short trainings on few pictures, where the KL alone leaves nine in ten unused.
            generator: source of the Gumbel noise; None = torch's global one.

        Returns:
            Loss and parts per subpixel: (reconstruction sum + beta * KL sum) / (b * c * H * W).

        Raises:
            ValueError: pictures of another shape, or gumbel_tau not above 0.

        Source:
            Ramesh et al. 2021, section A.2; the usage term is the diversity loss of wav2vec 2.0 (Baevski et al. 2020,
            https://arxiv.org/abs/2006.11477, section 3.2) as a KL. DALLE-pytorch divides only the reconstruction by
            the batch, so that its KL weight grows with it; here both share one divisor.
        """
        found = self.reconstruct(images, Relaxation(gumbel_tau, kl_weight, usage_weight), generator)
        reconstruction = self.reconstruction_error(found.output, images)
        return VAELoss(
            loss=reconstruction + found.codes_loss,
            reconstruction=reconstruction,
            kl=found.parts["kl"],
            usage=found.parts["usage"],
            image_tokens=found.image_tokens,
            reconstructions=self.to_pixels(found.output.detach()),
        )
