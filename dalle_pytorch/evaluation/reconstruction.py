"""How near pictures are to their originals, pixel by pixel: PSNR, L1, SSIM, MS-SSIM, a number for each picture.

Pictures are RGB in [0, 1]. Axes: b pictures, c channels, H W pixels, h w places of the window, _ = must equal
the other pictures' (an error says so).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.checks import check_rows
from dalle_pytorch.models.checks import check_same_shape

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, section III.C
C1, C2 = 0.01**2, 0.03**2  # (K1 L) ** 2 and (K2 L) ** 2, there, for pictures in [0, 1]
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2
LEAST_ERROR = 1e-12
"""Mean squared errors below count as this, so that equal pictures have 120 dB."""


def psnr_each(images: Float[Tensor, "b c H W"], targets: Float[Tensor, "_ _ _ _"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each picture in dB, 120 where they are equal.

    Raises:
        ValueError: shapes that differ, or pixels that are no numbers.
    """
    _check(images, targets)
    return -10 * (images - targets).double().square().mean(dim=(1, 2, 3)).clamp_min(LEAST_ERROR).log10()


def l1_each(images: Float[Tensor, "b c H W"], targets: Float[Tensor, "_ _ _ _"]) -> Float[Tensor, " b"]:
    """Mean absolute difference of each picture's pixels, in [0, 1].

    Raises:
        ValueError: shapes that differ, or pixels that are no numbers.
    """
    _check(images, targets)
    return (images - targets).double().abs().mean(dim=(1, 2, 3))


def ssim_each(images: Float[Tensor, "b c H W"], targets: Float[Tensor, "_ _ _ _"]) -> Float[Tensor, " b"]:
    """Structural similarity of each picture, in [-1, 1]: Gaussian windows that lie wholly inside, mean over channels.

    As scikit-image with gaussian_weights=True, sigma=1.5 and use_sample_covariance=False. (torchmetrics also counts
    windows over a mirrored border.)

    Raises:
        ValueError: shapes that differ, pixels that are no numbers, or pictures smaller than the window.

    Source:
        Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity", equation 13.
    """
    _check(images, targets)
    if min(images.shape[2:]) < WINDOW:
        raise UserError(f"SSIM needs pictures of at least {WINDOW} pixels, got {tuple(images.shape[2:])}")
    similarity, _ = _ssim_parts(images, targets)
    return similarity.mean(dim=1)


def ms_ssim_scales(image_size: int) -> int:
    """How many of the five scales pictures of a size have room for: the window must fit into the smallest.

    Fewer than five are another measure; say so in its name.
    """
    scales = 1
    while scales < len(SCALES) and image_size >> scales >= WINDOW:
        scales += 1
    return scales


def ms_ssim_each(
    images: Float[Tensor, "b c H W"], targets: Float[Tensor, "_ _ _ _"], *, scales: int = len(SCALES)
) -> Float[Tensor, " b"]:
    """Structural similarity over several scales of each picture, in [0, 1]; mean over channels.

    Args:
        images: what is judged.
        targets: the originals.
        scales: 5 as published, or the first few of them with weights that sum to one again.

    Raises:
        ValueError: shapes that differ, pixels that are no numbers, or pictures too small for the scales.

    Source:
        Wang et al. 2003, "Multiscale structural similarity for image quality assessment", equation 7.
    """
    _check(images, targets)
    side = min(images.shape[2:])
    if not 1 <= scales <= min(len(SCALES), ms_ssim_scales(side)):
        raise UserError(
            f"MS-SSIM with {scales} scales does not fit pictures of {side} pixels: they have room for "
            f"{ms_ssim_scales(side)}"
        )
    weights = torch.tensor(SCALES[:scales], dtype=torch.float64)
    parts = []
    for scale in range(scales):
        if scale:
            images, targets = F.avg_pool2d(images, 2), F.avg_pool2d(targets, 2)
        similarity, contrast = _ssim_parts(images, targets)
        parts.append(similarity if scale == scales - 1 else contrast)
    exponents = (weights / weights.sum()).view(-1, 1, 1).to(images.device)
    return (torch.stack(parts).clamp_min(0) ** exponents).prod(dim=0).mean(dim=1)


def _ssim_parts(
    images: Float[Tensor, "b c H W"], targets: Float[Tensor, "b c H W"]
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c"]]:
    """Structural similarity, and its contrast-structure factor alone, of each channel."""
    x, y = images.double(), targets.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variances = _blur(x * x) - mean_x**2 + _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    contrast = (2 * covariance + C2) / (variances + C2)
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return (luminance * contrast).mean(dim=(2, 3)), contrast.mean(dim=(2, 3))


def _blur(images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b c h w"]:
    """Weighted means over the window, where it lies wholly inside."""
    places = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-(places**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).expand(images.shape[1], 1, -1)
    rows = F.conv2d(images, weights[..., None], groups=images.shape[1])
    return F.conv2d(rows, weights[:, :, None], groups=images.shape[1])


def _check(images: Float[Tensor, "..."], targets: Float[Tensor, "..."]) -> None:
    check_same_shape(images, targets)
    check_rows(images, "pictures", least=1)
    check_rows(targets, "original pictures", least=1)
