"""Inception and LPIPS as their references have them, from files of the standard layout; any CLIP; failures."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torchmetrics.functional.image import lpips as theirs

from dalle_pytorch import load, save
from dalle_pytorch.checkpoints import hub
from dalle_pytorch.evaluation.features import (
    blurred,
    caption_features,
    clip_extractor,
    gaussian_blur,
    inception_extractor,
    inception_logits,
    load_inception,
    load_lpips,
    lpips_each,
)
from dalle_pytorch.evaluation.inception import Inception
from dalle_pytorch.evaluation.lpips import STAGES, WIDTHS
from dalle_pytorch.text import BPETokenizer


@pytest.fixture(scope="module")
def recorded():
    """Outputs of torch-fidelity's Inception, and the names and shapes of its weights."""
    with safe_open(Path(__file__).parent / "reference" / "inception.safetensors", framework="pt") as file:
        outputs = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    shapes = {}
    for line in metadata["keys"].splitlines():
        name, _, shape = line.partition(" ")
        shapes[name] = tuple(int(size) for size in re.findall(r"\d+", shape))
    return outputs, metadata["checksum"], shapes


@pytest.fixture(scope="module")
def inception_file(recorded, evaluation_script, seeded, tmp_path_factory):
    """Seeded weights in the layout of pt_inception-2015-12-05-6726825d.pth."""
    _, checksum, shapes = recorded
    state = {
        name: torch.zeros(shape, dtype=torch.long if name.endswith("tracked") else torch.float32)
        for name, shape in shapes.items()
    }
    evaluation_script("inception").fill(state)
    assert seeded.checksum(state) == checksum
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


def test_inception_gives_what_torch_fidelitys_gives(recorded, inception_file, evaluation_script):
    outputs, _, _ = recorded
    net = load_inception(inception_file)
    pixels = evaluation_script("inception").picture().float()
    with torch.no_grad():
        features, logits = net.body((pixels - 128) / 128)
    assert outputs["features"].std() > 0.01
    torch.testing.assert_close(features, outputs["features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, outputs["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.live
def test_the_recording_is_what_torch_fidelity_gives(recorded, evaluation_script):
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    outputs, weights = evaluation_script("inception").record()
    torch.testing.assert_close(outputs, recorded[0])
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == recorded[2]


def test_inception_has_the_weights_of_its_description(recorded):
    """94 convolutions with a norm each, and the classifier; as many parameters as torchvision's but for the heads."""
    with torch.device("meta"):
        net = Inception()
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert shapes == {name: shape for name, shape in recorded[2].items() if not name.endswith("tracked")}
    assert len(shapes) == 94 * 5 + 2
    convolutions = sum(p.numel() for name, p in net.named_parameters() if not name.startswith("fc."))
    assert convolutions == 21_785_568  # torchvision's inception_v3 has 27,161,264: with fc of 1000 and the second head
    assert convolutions + 2048 * 1000 + 1000 + 3_326_696 == 27_161_264


def test_inception_reads_pictures_of_any_size_and_does_not_depend_on_the_batch(inception_file):
    net = load_inception(inception_file)
    extract = inception_extractor(net)
    images = torch.rand(2, 3, 40, 40)
    together = extract(images)
    assert together.shape == (2, 2048)
    torch.testing.assert_close(together[:1], extract(images[:1]), rtol=1e-3, atol=1e-4)
    resized = F.interpolate(images[:1], (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(net.body(2 * resized - 1).features, together[:1], rtol=1e-3, atol=1e-4)
    assert inception_logits(net)(images[:1]).shape == (1, 1008)
    assert re.fullmatch(r"[0-9a-f]{64}", extract.weights_sha256)
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.fixture(scope="module")
def vgg():
    """torchvision's vgg16().features, layer by layer."""
    layers, inputs = [], 3
    for stage, width in zip(STAGES, WIDTHS, strict=True):
        for _ in stage:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def vgg_file(vgg, seeded, tmp_path_factory):
    """Seeded weights in the layout of vgg16-397923af.pth; the classifier is there too."""
    state = {f"features.{name}": tensor for name, tensor in vgg.state_dict().items()}
    seeded.fill(state)
    state |= {f"classifier.{place}.weight": torch.zeros(2, 2) for place in (0, 3, 6)}
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(state, path)
    return path


def test_lpips_is_that_of_torchmetrics(vgg, vgg_file, monkeypatch):
    """With the published heads, which torchmetrics brings along, over the same VGG."""
    net = load_lpips(vgg_file)
    assert sum(parameter.numel() for parameter in net.features.parameters()) == 14_714_688  # of vgg16().features
    assert [head.numel() for head in net.heads] == list(WIDTHS)
    assert all((head >= 0).all() for head in net.heads)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: vgg)
    weights = Path(theirs.__file__).parent / "lpips_models" / "vgg.pth"
    heads = torch.load(weights, map_location="cpu", weights_only=True)
    reference = theirs._LPIPS(pretrained=False, net="vgg")
    reference.load_state_dict(heads, strict=False)
    images, targets = torch.rand(3, 3, 40, 36), torch.rand(3, 3, 40, 36)
    expected = reference(images, targets, normalize=True).flatten()
    torch.testing.assert_close(lpips_each(net, images, targets), expected, rtol=1e-3, atol=1e-5)
    assert expected.min() > 0.01
    assert lpips_each(net, images, images).tolist() == [0, 0, 0]


def test_lpips_refuses_what_it_cannot_see(vgg_file):
    net = load_lpips(vgg_file)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        net(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="resize one"):
        net(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 32, 32))


def test_any_clip_is_an_extractor(tiny_clip, tmp_path):
    tokenizer = BPETokenizer.train(["a red apple"], 300)
    config = {**vars(tiny_clip.config), "text_vocab_size": tokenizer.vocab_size}
    clip = type(tiny_clip)(type(tiny_clip.config)(**config))
    clip.text_tokenizer = tokenizer
    save(clip, tmp_path / "clip.safetensors")
    loaded = load(tmp_path / "clip.safetensors")
    extract, images = clip_extractor(loaded), torch.rand(40, 3, 16, 16)
    features = extract(images)
    torch.testing.assert_close(features, clip.eval().encode_image(images).detach(), rtol=1e-4, atol=1e-5)
    assert extract.name == "clip"
    assert "16 pixels" in extract.protocol
    captions = caption_features(loaded, ["a red apple", "a red apple and another red apple and one more"])
    assert captions.shape == (2, 8)
    torch.testing.assert_close(captions.norm(dim=1), torch.ones(2))
    with torch.no_grad():
        loaded.log_logit_scale += 1
    assert clip_extractor(loaded).weights_sha256 != extract.weights_sha256


def test_a_blur_is_a_gaussian_filter(tiny_clip):
    """A point becomes the bell of its radius, a flat picture stays, and only sums over the border are lost."""
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    blur = gaussian_blur(point, 2.0)
    y, x = np.mgrid[-20:21, -20:21]
    bell = np.exp(-(x**2 + y**2) / 8) / (2 * np.pi * 4)
    np.testing.assert_allclose(blur[0, 1].numpy(), bell, atol=1e-4)
    assert blur.sum().item() == pytest.approx(3, rel=1e-5)
    flat = torch.full((2, 3, 16, 16), 0.3)
    torch.testing.assert_close(gaussian_blur(flat, 8.0), flat)
    extract, images = clip_extractor(tiny_clip), torch.rand(2, 3, 16, 16)
    filtered = blurred(extract, 1.5)
    torch.testing.assert_close(filtered(images), extract(gaussian_blur(images, 1.5)))
    assert "blur of 1.5 pixels" in filtered.protocol
    assert blurred(extract, 0.0) is extract
    with pytest.raises(ValueError, match="negative"):
        blurred(extract, -1.0)


def test_a_clip_without_tokenizer_cannot_read(tiny_clip):
    with pytest.raises(ValueError, match="text_tokenizer"):
        caption_features(tiny_clip, ["a"])


def test_weights_are_found_in_folders_and_on_the_hub(vgg_file, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda name: {"owner/vgg": vgg_file.parent}[name])
    for place in (vgg_file.parent, "owner/vgg"):
        load_lpips(place)
    with pytest.raises(ValueError, match="must hold one file of weights, it has none"):
        load_lpips(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file or folder nothing\.pth"):
        load_lpips("nothing.pth")


def test_files_of_other_networks_are_refused_with_the_right_name(vgg_file, inception_file, tmp_path):
    with pytest.raises(ValueError, match=r"left over.*features\.0\.bias.*pt_inception-2015-12-05"):
        load_inception(vgg_file)
    with pytest.raises(ValueError, match=r"left over.*vgg16-397923af"):
        load_lpips(inception_file)
    with pytest.raises(ValueError, match=r"left over.*lpips/weights"):
        load_lpips(vgg_file, heads=vgg_file)
    state = torch.load(inception_file, weights_only=True)
    state["fc.weight"], state["fc.bias"] = torch.zeros(1000, 2048), torch.zeros(1000)  # torchvision's
    torch.save(state, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match=r"fc\.\w+ is \(1000.*pt_inception"):
        load_inception(tmp_path / "torchvision.pth")
    del state["Mixed_6b.branch1x1.conv.weight"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"missing Mixed_6b\.branch1x1\.conv\.weight"):
        load_inception(tmp_path / "less.pth")
    (tmp_path / "cut.pth").write_bytes(inception_file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read"):
        load_inception(tmp_path / "cut.pth")
