"""Networks that metrics look through, apart from the metrics: Inception, LPIPS, a probe, and any CLIP that we load.

Weights are never brought along: a file, a folder, or an id of the Hugging Face hub names them, and their hash goes into
every number. Axes: b pictures, e features, t captions, c channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dalle_pytorch.checkpoints import checkpoint, hub
from dalle_pytorch.checkpoints.checkpoint import weights_sha256
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import read
from dalle_pytorch.errors import UserError
from dalle_pytorch.evaluation.inception import Inception
from dalle_pytorch.evaluation.lpips import LPIPS
from dalle_pytorch.evaluation.shares import in_parts
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.probe import Probe
from dalle_pytorch.models.skeleton import skeleton
from dalle_pytorch.models.two_towers import TwoTowers

TOGETHER = 32
"""Pictures in one call of a network; no number depends on it."""
SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".safetensors")

INCEPTION_KEYS: Table = {
    r".*\.num_batches_tracked": None,  # training's counter
    r"AuxLogits\..*": None,  # a second head, for training
    r"(?:Conv2d|Mixed|fc)[\w.]*": r"\g<0>",
}
VGG_KEYS: Table = {r"features\.\d+\.(?:weight|bias)": r"\g<0>", r"classifier\..*": None}
HEAD_KEYS: Table = {r"lin(\d)\.model\.1\.weight": r"heads.\1"}


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


def load_inception(weights: str | Path) -> Inception:
    """The Inception of FID.

    Args:
        weights: pt_inception-2015-12-05-6726825d.pth, a folder with it, or an id of the hub.

    Raises:
        FileNotFoundError: no such file or id.
        UserError: weights of another network; names what does not fit.
    """
    hint = "FID's Inception is pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid"
    with skeleton():
        net = Inception()
    return _fill(net, {**_state(weights, INCEPTION_KEYS, hint)}, weights, hint)


def load_lpips(weights: str | Path, heads: str | Path | None = None) -> LPIPS:
    """LPIPS with the VGG-16.

    Args:
        weights: torchvision's vgg16-397923af.pth, a folder with it, or an id of the hub.
        heads: vgg.pth of richzhang/PerceptualSimilarity, lpips/weights/v0.1; None = the one of torchmetrics.

    Raises:
        FileNotFoundError: no such file or id.
        UserError: weights of another network; names what does not fit.
    """
    hint = "LPIPS needs torchvision's vgg16-397923af.pth of download.pytorch.org/models"
    head_hint = "the heads are lpips/weights/v0.1/vgg.pth of github.com/richzhang/PerceptualSimilarity"
    own = resources.files("torchmetrics.functional.image") / "lpips_models" / "vgg.pth"
    with resources.as_file(own) as path:
        state = _state(weights, VGG_KEYS, hint) | _state(path if heads is None else heads, HEAD_KEYS, head_hint)
    with skeleton():
        net = LPIPS()
    return _fill(net, state, weights, hint)


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


def _state(weights: str | Path, table: Table, hint: str) -> dict[str, Tensor]:
    """The weights of a file under our names, as fp32."""
    path = _locate(weights)
    content = read(path)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no dict of weights; {hint}")
    try:
        renamed = rename(content, table)
    except UserError as error:
        raise UserError(f"{path}: {error}; {hint}") from error
    return {name: tensor.float() for name, tensor in renamed.items()}


def _fill(net: Any, state: dict[str, Tensor], weights: str | Path, hint: str) -> Any:
    try:
        for name, tensor in state.items():
            checkpoint.check_finite(name, tensor, tensor)
        checkpoint.load_state(net, state)
    except UserError as error:
        raise UserError(f"{weights}: {error}; {hint}") from error
    return net.requires_grad_(False).eval()


def _locate(weights: str | Path) -> Path:
    """The one file of weights that is meant.

    Raises:
        FileNotFoundError: no such file, nor an id of the hub.
        UserError: a folder with no file of weights, or several.
    """
    path = Path(weights)
    if not path.exists():
        if not hub.is_hub_id(str(weights)):
            raise FileNotFoundError(f"no file or folder {weights}; give the path of the weights, or an id of the hub")
        path = hub.fetch(str(weights))
    if path.is_file():
        return path
    found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{weights} must hold one file of weights, it has {names}; give the path of the file")
    return found[0]
