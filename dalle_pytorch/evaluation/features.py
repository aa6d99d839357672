"""Networks that metrics look through, apart from the metrics: Inception, LPIPS, a probe, and any CLIP that we load.

Weights are never brought along: a file, a folder, or an id of the Hugging Face hub names them, and their hash goes into
every number. Axes: b pictures, e features, t captions, c channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.checkpoints import checkpoint
from dalle_pytorch.checkpoints.checkpoint import weights_sha256
from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.shares import in_parts
from dalle_pytorch.models.inception import Inception
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.models.mobilenet import MobileNetV2
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.pretrained_encoder import PretrainedEncoder
from dalle_pytorch.models.probe import Probe
from dalle_pytorch.models.two_towers import TwoTowers

TOGETHER = 32
"""Pictures in one call of a network; no number depends on it."""


@dataclass(frozen=True)
class Extractor:
    """A network that turns pictures into features, and what a reader of its numbers must know."""

    name: str
    """"inception", or what stands in the names of its metrics ("clip": fid_clip, "probe": fid_probe)."""
    protocol: str
    """How pictures reach the network."""
    weights_sha256: str
    """Of the weights themselves, whatever file they come from."""
    network: nn.Module
    function: Callable[[Tensor], Tensor]
    """Pictures in [0, 1] to features."""

    def __call__(self, images: Float[Tensor, "b c H W"]) -> Float[Tensor, "b e"]:
        """Features of pictures in [0, 1], on the CPU."""
        device = next(self.network.parameters()).device
        with eval_mode(self.network):
            parts = images.split(TOGETHER)
            return torch.cat(in_parts(lambda part: self.function(part.to(device)).float().cpu(), parts))


def inception_extractor(net: Inception) -> Extractor:
    """Features of FID, KID, precision and recall."""
    protocol = "pytorch-fid: bilinear to 299, no antialiasing, 2048 features"
    return Extractor("inception", protocol, weights_sha256(net), net, lambda images: net(images).features)


def inception_logits(net: Inception) -> Extractor:
    """Class scores of the Inception score."""
    protocol = "pytorch-fid: bilinear to 299, no antialiasing, 1008 class scores without bias"
    return Extractor("inception", protocol, weights_sha256(net), net, lambda images: net(images).logits)


def clip_extractor(clip: TwoTowers) -> Extractor:
    """Unit picture features of a CLIP, of ours or released."""
    kind, size = checkpoint.header(clip)["kind"], clip.config.image_size
    return Extractor("clip", f"{kind} at {size} pixels, unit length", weights_sha256(clip), clip, clip.encode_image)


def encoder_extractor(net: MobileNetV2 | PretrainedEncoder) -> Extractor:
    """Features of an image encoder, under the name of its kind."""
    if isinstance(net, MobileNetV2):
        name, protocol = "mobilenet", "torchvision's MobileNetV2: bilinear to 224, antialiased, 1280 features"
    else:
        name, protocol = net.name, f"{net.name} of transformers: bicubic to {net.image_size}, antialiased, pooled"
    return Extractor(name, protocol, weights_sha256(net), net, net.encode)


def lpips_extractor(net: LPIPS) -> Extractor:
    """The network of LPIPS, for reports; it gives distances, and no features."""
    name = {"vgg": "vgg16", "alex": "alexnet"}[net.name]
    return Extractor(f"{name} with lpips heads 0.1", "own size", weights_sha256(net), net, lambda x: x)


def probe_extractor(probe: Probe) -> Extractor:
    """Features of a probe."""
    protocol = f"probe at {probe.config.image_size} pixels, {probe.config.num_features} features"
    return Extractor("probe", protocol, weights_sha256(probe), probe, probe.encode_image)


def blurred(extractor: Extractor, radius: float) -> Extractor:
    """The same network behind a Gaussian filter: what is left of a distance when fine detail does not count.

    Args:
        extractor: any.
        radius: standard deviation of the filter in pixels of the pictures that are given; the paper takes 0, 1, 2, 4
            and 8 of 256.

    Raises:
        UserError: radius is negative.

    Source:
        Ramesh et al. 2021, https://arxiv.org/abs/2102.12092, section 3.1 and figure 9.
    """
    if radius < 0:
        raise UserError(f"the radius of a blur must not be negative, got {radius}")
    if radius == 0:
        return extractor
    protocol = f"Gaussian blur of {radius:g} pixels; {extractor.protocol}"
    return replace(extractor, protocol=protocol, function=lambda x: extractor.function(gaussian_blur(x, radius)))


def gaussian_blur(images: Float[Tensor, "b c H W"], radius: float) -> Float[Tensor, "b c H W"]:
    """Pictures through a Gaussian filter of this standard deviation, cut off at four of them; borders are repeated."""
    reach = max(1, round(4 * radius))
    places = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-(places**2) / (2 * radius**2))
    weights = (weights / weights.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    rows = F.conv2d(padded, weights[..., None], groups=images.shape[1])
    return F.conv2d(rows, weights[:, :, None], groups=images.shape[1])


def caption_features(clip: TwoTowers, captions: Sequence[str]) -> Float[Tensor, "t e"]:
    """Unit features of captions, on the CPU; each is cut to the model's context.

    Raises:
        UserError: the model carries no text tokenizer.
    """
    tokens = clip.tokenize(captions)
    with eval_mode(clip):
        return torch.cat(in_parts(lambda part: clip.encode_text(part).cpu(), tokens.split(TOGETHER)))


def lpips_each(net: LPIPS, images: Float[Tensor, "b c H W"], targets: Float[Tensor, "_ _ _ _"]) -> Float[Tensor, " b"]:
    """Distance of each picture to its target, on the CPU."""
    device = net.shift.device
    with eval_mode(net):
        pairs = list(zip(images.split(TOGETHER), targets.split(TOGETHER), strict=True))
        return torch.cat(in_parts(lambda pair: net(pair[0].to(device), pair[1].to(device)).cpu(), pairs))
