"""Pretrained networks that losses and metrics look through, from the files that their authors publish.

Weights are never brought along: a file, a folder, or an id of the Hugging Face hub names them.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle_pytorch.checkpoints import checkpoint, hub
from dalle_pytorch.checkpoints.importers.table import Table, rename
from dalle_pytorch.checkpoints.reader import read
from dalle_pytorch.errors import UserError, first_line, some
from dalle_pytorch.models.inception import Inception
from dalle_pytorch.models.lpips import LPIPS
from dalle_pytorch.models.mobilenet import IMAGENET_MEAN, IMAGENET_STD, MobileNetV2
from dalle_pytorch.models.pretrained_encoder import PretrainedEncoder
from dalle_pytorch.models.skeleton import skeleton

SUFFIXES = (".pth", ".pt", ".pkl", ".bin", ".safetensors")

INCEPTION_KEYS: Table = {
    r".*\.num_batches_tracked": None,  # training's counter
    r"AuxLogits\..*": None,  # a second head, for training
    r"(?:Conv2d|Mixed|fc)[\w.]*": r"\g<0>",
}
FEATURE_KEYS: Table = {r"features\.\d+\.(?:weight|bias)": r"\g<0>", r"classifier\..*": None}
MOBILENET_KEYS: Table = {r".*\.num_batches_tracked": None, r"(?:features|classifier)\..*": r"\g<0>"}
ALEXNET_KERNEL = 11
"""Of its first convolution, by which its file is known; the VGG's is 3."""
HEAD_KEYS: Table = {r"lin(\d)\.model\.1\.weight": r"heads.\1"}


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
    return _fill(net, _state(weights, INCEPTION_KEYS, hint), weights, hint)


def load_lpips(weights: str | Path, heads: str | Path | None = None) -> LPIPS:
    """LPIPS with the VGG-16 or the AlexNet, whichever the file is of.

    Args:
        weights: torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth, a folder with it, or an id of the hub.
        heads: vgg.pth or alex.pth of richzhang/PerceptualSimilarity, lpips/weights/v0.1; None = that of torchmetrics.

    Raises:
        FileNotFoundError: no such file or id.
        UserError: weights of another network; names what does not fit.
    """
    hint = "LPIPS needs torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth of download.pytorch.org/models"
    state = _state(weights, FEATURE_KEYS, hint)
    first = state.get("features.0.weight")
    network = "alex" if first is not None and first.shape[-1] == ALEXNET_KERNEL else "vgg"
    head_hint = f"the heads are lpips/weights/v0.1/{network}.pth of github.com/richzhang/PerceptualSimilarity"
    own = resources.files("torchmetrics.functional.image") / "lpips_models" / f"{network}.pth"
    with resources.as_file(own) as path:
        state |= _state(path if heads is None else heads, HEAD_KEYS, head_hint)
    with skeleton():
        net = LPIPS(network)
    return _fill(net, state, weights, hint)


def load_mobilenet(weights: str | Path) -> MobileNetV2:
    """The MobileNetV2 of torchvision.

    Args:
        weights: mobilenet_v2-b0353104.pth or mobilenet_v2-7ebf99e0.pth, a folder with it, or an id of the hub.

    Raises:
        FileNotFoundError: no such file or id.
        UserError: weights of another network; names what does not fit.
    """
    hint = "MobileNetV2 is torchvision's mobilenet_v2-b0353104.pth of download.pytorch.org/models"
    with skeleton():
        net = MobileNetV2()
    return _fill(net, _state(weights, MOBILENET_KEYS, hint), weights, hint)


def load_encoder(weights: str | Path) -> MobileNetV2 | PretrainedEncoder:
    """An image encoder: torchvision's MobileNetV2 from its file, else a vision model of transformers from its folder.

    Args:
        weights: a file of ``load_mobilenet``, a folder with config.json, or an id of the hub.

    Raises:
        FileNotFoundError: no such file or id.
        UserError: the folder is of no vision model.
    """
    folder = Path(weights)
    if not folder.exists() and hub.is_hub_id(str(weights)):
        folder = hub.fetch(str(weights))
    if not (folder / "config.json").is_file():
        return load_mobilenet(folder)
    from transformers import AutoModel  # a second to import, and few need it

    hint = f"{weights} is no image encoder that transformers can load from its safetensors"
    try:
        net, info = AutoModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{hint}: {first_line(error)}") from error
    net = getattr(net, "vision_model", net)  # of two towers the one for images
    if net.main_input_name != "pixel_values":
        raise UserError(f"{hint}: it reads {net.main_input_name}")
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing or net.config.model_type == "vit_mae":  # which masks patches at random
        raise UserError(f"{hint}: {'it has no ' + some(missing) if missing else 'its features are random'}")
    path = folder / "preprocessor_config.json"
    asks = json.loads(path.read_text()) if path.is_file() else {}
    size = asks.get("crop_size") or asks.get("size") or getattr(net.config, "image_size", 224)
    side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
    mean, std = asks.get("image_mean", IMAGENET_MEAN), asks.get("image_std", IMAGENET_STD)
    pooled = not info["missing_keys"]
    return PretrainedEncoder(net, net.config.model_type, side, mean, std, pooled=pooled).requires_grad_(False).eval()


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
