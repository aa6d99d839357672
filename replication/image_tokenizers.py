"""Trains an image tokenizer and measures what its codes keep, how many it uses, and what the relaxation hides.

Axes: b pictures, c channels, H W pixels.
"""

import math

import torch
from jaxtyping import Float
from omegaconf import OmegaConf
from torch import Tensor

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.evaluation.codebook import codebook_use
from dalle_pytorch.evaluation.image_tokenizer import reconstruct
from dalle_pytorch.evaluation.reconstruction import l1_each, psnr_each
from dalle_pytorch.models.discrete_vae import DiscreteVAE
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.training.schedules import ScheduleConfig, scheduled
from replication.arms import Job, Result, train
from replication.pictures import EMOJI, HELD_OUT, read

HARD = 1e-4
"""Temperature at which a relaxed code is a sampled one, to the precision of fp32."""


def run(job: Job) -> Result:
    """Train with ``job.settings`` on top of ``experiment=replicate``; all numbers are of held-out pictures."""
    weights = train("vae", ["experiment=replicate", *job.settings], job.seed, job.folder / "vae", job.threads)
    vae = checkpoint.load(weights, kind="vae")
    images = read(EMOJI, HELD_OUT, vae.image_size).images
    tokens, decoded = reconstruct(vae, images)
    use = codebook_use(tokens, vae.codebook_size, vae.image_size)
    numbers = {
        "psnr": psnr_each(decoded, images).mean().item(),
        "l1": l1_each(decoded, images).mean().item(),
        "codes_used": float(use.used),
        "used_share": 100 * use.used / vae.codebook_size,
        "perplexity": use.perplexity,
    }
    if isinstance(vae, DiscreteVAE):
        numbers |= gap(vae, images, last_tau(job)) | outside(vae, images)
    return Result(numbers)


def last_tau(job: Job) -> float:
    """The temperature at which the training ended."""
    found = OmegaConf.load(job.folder / "vae" / "config.yaml")
    schedule = ScheduleConfig(**found.gumbel_tau)
    return scheduled(schedule, found.trainer.max_steps, found.trainer.max_steps)


def gap(vae: DiscreteVAE, images: Float[Tensor, "b c H W"], tau: float) -> dict[str, float]:
    """Reconstruction error with relaxed codes at ``tau`` and with codes sampled from the same noise, and how far they
    are apart: what the bound that was trained hides of the bound that counts. In units of the likelihood.
    """
    errors = []
    with eval_mode(vae):
        for temperature in (tau, HARD):
            generator = torch.Generator().manual_seed(0)
            output = vae.relaxed(images, temperature, generator)[1]
            errors.append(vae.reconstruction_error(output, images).item())
    return {"relaxed": errors[0], "sampled": errors[1], "gap": errors[1] - errors[0]}


def outside(vae: DiscreteVAE, images: Float[Tensor, "b c H W"]) -> dict[str, float]:
    """Share of the model's probability for pixel values that no picture has, in per cent.

    A squared error is the likelihood of a Gaussian, the smooth L1 nearly that of a Laplace; either has the scale that
    fits the held-out errors best. The logit-Laplace lives in (0, 1) by construction.
    """
    if vae.config.likelihood == "logit_laplace":
        return {"outside": 0.0}
    with eval_mode(vae):
        output = vae.relaxed(images, HARD, torch.Generator().manual_seed(0))[1]
    error = output - (images - vae.mean) / vae.std
    low, high = -vae.mean / vae.std, (1 - vae.mean) / vae.std
    if vae.config.likelihood == "mse":
        scale = error.square().mean().sqrt() * math.sqrt(2)
        tails = torch.erfc((output - low) / scale) / 2 + torch.erfc((high - output) / scale) / 2
    else:
        scale = error.abs().mean()
        tails = laplace_tail(output - low, scale) + laplace_tail(high - output, scale)
    return {"outside": 100 * tails.mean().item()}


def laplace_tail(distance: Float[Tensor, "b c H W"], scale: Float[Tensor, ""]) -> Float[Tensor, "b c H W"]:
    """Probability that a Laplace variable lies more than ``distance`` below its centre; above it where negative."""
    half = torch.exp(-distance.abs() / scale) / 2
    return torch.where(distance >= 0, half, 1 - half)
