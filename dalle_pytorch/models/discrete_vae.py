"""DiscreteVAE: stage one, a codebook of picture tokens learnt with the Gumbel-softmax relaxation.

Paper: Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, sections 2.1, A.2 and A.3.
The layers are those of DALLE-pytorch 1.6.6 (strided 4 x 4 convolutions, residual blocks at the bottleneck), so that its
users find the sizes they know; the loss is the paper's.

Axes: b batch, c channels, H W pixels, h w token grid, n = h * w, k codebook_size, d codebook_dim.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from dalle_pytorch.models.image_tokenizer import ImageTokenizer

LIKELIHOODS = ("mse", "smooth_l1", "logit_laplace")
LOGIT_LAPLACE_EPS = 0.1  # section A.3: keeps pixels away from 0 and 1, where the density diverges


@dataclass(kw_only=True)
class DiscreteVAEConfig:
    """Sizes and likelihood of a DiscreteVAE."""

    image_size: int = 64
    """Side of the square picture in pixels; a multiple of 2 ** num_layers."""
    num_layers: int = 3
    """Halvings of the resolution: grid_size = image_size / 2 ** num_layers."""
    codebook_size: int = 1024
    """Number of codes (the paper: 8192)."""
    codebook_dim: int = 256
    """Width of a code vector."""
    hidden_dim: int = 128
    """Channels of the convolutions."""
    num_resnet_blocks: int = 2
    """Residual blocks at the bottleneck, in the encoder and again in the decoder; 0 = none."""
    taper: bool = False
    """Halve the channels with every doubling of the resolution; cheaper: the finest layers hold most of the work."""
    channels: int = 3
    """Picture channels, 1 to 4."""
    likelihood: str = "mse"
    """Reconstruction term: "mse", "smooth_l1" (both in [-1, 1] units) or "logit_laplace" (nats)."""
    straight_through: bool = False
    """Hard one-hot codes forward, soft gradient backward; the paper trains soft."""
    reinmax: bool = False
    """Second-order straight-through gradient (https://arxiv.org/abs/2304.08612); needs straight_through."""
    mean: list[float] = field(default_factory=lambda: [0.5])
    """Subtracted from the picture, per channel or one for all."""
    std: list[float] = field(default_factory=lambda: [0.5])
    """Divides the picture after ``mean``, per channel or one for all."""
    gumbel_tau: float = 0.9
    """Temperature of calls in DALLE-pytorch's way that give none; our training has a schedule."""
    kl_weight: float = 0.0
    """Beta of calls in DALLE-pytorch's way; our training has a schedule."""

    def __post_init__(self) -> None:
        """Validate; every message names the field and the values.

        Raises:
            ValueError: a field is out of range.
        """
        for name in ("image_size", "num_layers", "codebook_size", "codebook_dim", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % 2**self.num_layers:
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of 2 ** num_layers ({2**self.num_layers})"
            )
        if not 1 <= self.channels <= 4:
            raise ValueError(f"channels must be 1 to 4, got {self.channels}")
        if self.taper and self.hidden_dim % 2 ** (self.num_layers - 1):
            raise ValueError(
                f"taper halves the channels {self.num_layers - 1} times: hidden_dim ({self.hidden_dim}) must be a "
                f"multiple of {2 ** (self.num_layers - 1)}"
            )
        if self.num_resnet_blocks < 0:
            raise ValueError(f"num_resnet_blocks must not be negative, got {self.num_resnet_blocks}")
        if self.likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {self.likelihood!r}")
        if self.reinmax and not self.straight_through:
            raise ValueError("reinmax corrects the straight-through gradient: set straight_through=true as well")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(f"{name} must have 1 or {self.channels} values, got {getattr(self, name)}")
        if min(self.std) <= 0 or self.gumbel_tau <= 0:
            raise ValueError(f"std ({self.std}) and gumbel_tau ({self.gumbel_tau}) must be above 0")


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


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions and a 1 x 1, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.last = nn.Conv2d(channels, channels, 1)
        self.net = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Same shape in and out."""
        return self.last(self.net(x)) + x


def make_encoder(config: DiscreteVAEConfig) -> nn.Sequential:
    """Pixels to code logits."""
    layers: list[nn.Module] = []
    source = config.channels
    for doublings in reversed(range(config.num_layers)):  # how often the token grid is doubled to reach this layer's
        target = config.hidden_dim >> doublings if config.taper else config.hidden_dim
        layers += [nn.Conv2d(source, target, 4, stride=2, padding=1), nn.ReLU()]
        source = target
    layers += [ResBlock(source) for _ in range(config.num_resnet_blocks)]
    # 1 x 1 on both sides of the relaxation: a small receptive field there generalises better (section 2.1)
    return nn.Sequential(*layers, nn.Conv2d(source, config.codebook_size, 1))


def make_decoder(config: DiscreteVAEConfig) -> nn.Sequential:
    """Code vectors to pixels, or to the maps of the likelihood."""
    maps = config.channels * (2 if config.likelihood == "logit_laplace" else 1)  # mu and ln b
    layers: list[nn.Module] = []
    source = config.codebook_dim
    if config.num_resnet_blocks:  # without blocks the first upsampling reads the codes itself, as in DALLE-pytorch
        layers += [nn.Conv2d(source, config.hidden_dim, 1)]
        source = config.hidden_dim
        layers += [ResBlock(source) for _ in range(config.num_resnet_blocks)]
    for doubling in range(1, config.num_layers + 1):
        if config.taper and doubling == config.num_layers:
            return nn.Sequential(*layers, nn.ConvTranspose2d(source, maps, 4, stride=2, padding=1))
        target = config.hidden_dim >> doubling if config.taper else config.hidden_dim
        layers += [nn.ConvTranspose2d(source, target, 4, stride=2, padding=1), nn.ReLU()]
        source = target
    return nn.Sequential(*layers, nn.Conv2d(source, maps, 1))


class DiscreteVAE(ImageTokenizer):
    """Encoder to code logits, relaxed codes, decoder to pixels.

    Args:
        config: sizes and likelihood.

    Source:
        Ramesh et al. 2021, section 2.1. Deviation: strided convolutions in place of max-pooled bottleneck groups.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: DiscreteVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.grid_size = config.image_size // 2**config.num_layers
        self.codebook_size = config.codebook_size
        self.channels = config.channels
        self.encoder, self.decoder = make_encoder(config), make_decoder(config)
        self.codebook = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.init_weights()
        self.register_buffer("mean", torch.tensor(config.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, -1, 1, 1), persistent=False)

    def init_weights(self) -> None:
        """He initialisation, so that the first code logits tell pictures apart.

        Residual branches start at 0.3 of their scale and the output at half, both to keep the start calm (the paper
        scales residuals by a constant as well, section A.1).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # a transposed convolution of kernel 4 and stride 2 sums 2 x 2 inputs into each output
                fan_in = 4 * module.in_channels if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
                nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, ResBlock):
                    module.last.weight.mul_(0.3)
            for parameter in self.decoder[-1].parameters():
                parameter.mul_(0.5)

    def encode_logits(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b k h w"]:
        """Code logits of every grid position, from pictures in [0, 1]."""
        self.check_images(images)
        return self.encoder((images - self.mean) / self.std)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b c H W"]) -> Int[Tensor, "b n"]:
        """Most likely code of every position; no Gumbel noise (section 2.2)."""
        with torch.autocast(images.device.type, enabled=False):  # the same codes in training as when cached or sampled
            return self.encode_logits(images.float()).argmax(dim=1).flatten(1)

    def decode(self, image_tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b c H W"]:
        """Pictures in [0, 1]."""
        self.check_tokens(image_tokens)
        codes = rearrange(self.codebook(image_tokens), "b (h w) d -> b d h w", h=self.grid_size)
        return self.to_pixels(self.decoder(codes))

    def to_pixels(self, output: Float[Tensor, "b maps H W"]) -> Float[Tensor, "b c H W"]:
        """Decoder output to pictures in [0, 1]; the scale map of the logit-Laplace is ignored (section A.3)."""
        if self.config.likelihood == "logit_laplace":
            eps = LOGIT_LAPLACE_EPS
            pixels = (torch.sigmoid(output[:, : self.channels]) - eps) / (1 - 2 * eps)
        else:
            pixels = output * self.std + self.mean
        return pixels.clamp(0, 1)

    def relax(
        self, logits: Float[Tensor, "b k h w"], gumbel_tau: float, generator: torch.Generator | None
    ) -> Float[Tensor, "b k h w"]:
        """Gumbel-softmax sample of the codes: soft, or one-hot with a straight-through gradient."""
        noise = torch.empty_like(logits).exponential_(generator=generator).clamp_min(1e-20).log().neg()
        soft = ((logits + noise) / gumbel_tau).softmax(dim=1)
        if not self.config.straight_through:
            return soft
        hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
        if not self.config.reinmax:
            return hard + soft - soft.detach()
        # ReinMax, Liu et al. 2023, algorithm 2: Heun's step between the prior and the sample
        prior = logits.softmax(dim=1)
        halfway = (hard + (logits / gumbel_tau).softmax(dim=1)) / 2
        shifted = ((halfway.clamp_min(1e-20).log() - logits).detach() + logits).softmax(dim=1)
        surrogate = 2 * shifted - 0.5 * prior
        return hard + surrogate - surrogate.detach()

    def relaxed(
        self, images: Float[Tensor, "b c H W"], gumbel_tau: float, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b maps H W"]]:
        """Code logits and the decoder's output for relaxed codes, with gradients.

        Raises:
            ValueError: pictures of another shape, or gumbel_tau not above 0.
        """
        if gumbel_tau <= 0:
            raise ValueError(f"gumbel_tau must be above 0, got {gumbel_tau}")
        logits = self.encode_logits(images).float()
        codes = torch.einsum("bkhw,kd->bdhw", self.relax(logits, gumbel_tau, generator), self.codebook.weight)
        return logits, self.decoder(codes).float()

    def reconstruction_error(
        self, output: Float[Tensor, "b maps H W"], images: Float[Tensor, "b c H W"]
    ) -> Float[Tensor, ""]:
        """Mean over subpixels of the negative log-likelihood, up to constants."""
        if self.config.likelihood == "logit_laplace":
            return logit_laplace_nll(output, images)
        target = (images - self.mean) / self.std
        if self.config.likelihood == "smooth_l1":
            return F.smooth_l1_loss(output, target)
        return F.mse_loss(output, target)

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
        logits, output = self.relaxed(images, gumbel_tau, generator)
        reconstruction = self.reconstruction_error(output, images)
        # KL of the categorical at temperature 1, whatever gumbel_tau (the author, openai/DALL-E issue 26)
        log_q = logits.log_softmax(dim=1)
        q = log_q.exp()
        kl = (q * (log_q + math.log(self.codebook_size))).sum() / images.numel()
        usage = math.log(self.codebook_size) - torch.special.entr(q.mean(dim=(0, 2, 3))).sum()
        return VAELoss(
            loss=reconstruction + kl_weight * kl + usage_weight * usage,
            reconstruction=reconstruction,
            kl=kl,
            usage=usage,
            image_tokens=logits.detach().argmax(dim=1).flatten(1),
            reconstructions=self.to_pixels(output.detach()),
        )


def logit_laplace_nll(output: Float[Tensor, "b maps H W"], images: Float[Tensor, "b c H W"]) -> Float[Tensor, ""]:
    """Mean negative log-density of pictures under the logit-Laplace, nats per subpixel.

    Args:
        output: decoder maps, mu of each channel then ln b of each.
        images: pictures in [0, 1]; squeezed into [eps, 1 - eps] here.

    Source:
        Ramesh et al. 2021, section A.3: ln(2b) + ln(x(1 - x)) + |logit(x) - mu| / b.
    """
    mu, log_b = output.chunk(2, dim=1)
    # ln b is bounded: exact black or white (most of an icon) would drive b to 0 and the density to infinity
    log_b = log_b.clamp(-5, 5)
    x = images * (1 - 2 * LOGIT_LAPLACE_EPS) + LOGIT_LAPLACE_EPS
    nll = math.log(2) + log_b + (x * (1 - x)).log() + (x.logit() - mu).abs() * (-log_b).exp()
    return nll.mean()
