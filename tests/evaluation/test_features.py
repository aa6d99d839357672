"""Inception and LPIPS as their references have them, from files of the standard layout; any CLIP; failures."""

import json
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
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
)

from dalle_pytorch import load, save
from dalle_pytorch.checkpoints import hub
from dalle_pytorch.checkpoints.pretrained import load_encoder, load_inception, load_lpips
from dalle_pytorch.evaluation.features import (
    blurred,
    caption_features,
    clip_extractor,
    encoder_extractor,
    gaussian_blur,
    inception_extractor,
    inception_logits,
    lpips_each,
    lpips_extractor,
)
from dalle_pytorch.models.inception import Inception
from dalle_pytorch.models.lpips import NETWORKS
from dalle_pytorch.models.mobilenet import MobileNetV2
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
    for stage in NETWORKS["vgg"].stages:
        for conv in stage:
            layers += [nn.Conv2d(inputs, conv.width, 3, padding=1), nn.ReLU()]
            inputs = conv.width
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
    assert [head.numel() for head in net.heads] == NETWORKS["vgg"].widths
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


def test_lpips_through_alexnet_is_that_of_torchmetrics(seeded, tmp_path, monkeypatch):
    """torchvision's alexnet().features, layer by layer, from a file in its layout."""
    layers = []
    for source, width, kernel, stride, padding in ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1),
                                                   (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)):  # fmt: skip
        layers += [nn.Conv2d(source, width, kernel, stride, padding), nn.ReLU()]
        if source in (3, 64) or len(layers) > 10:
            layers.append(nn.MaxPool2d(3, 2))
    alexnet = nn.Sequential(*layers)
    state = {f"features.{name}": tensor for name, tensor in alexnet.state_dict().items()}
    seeded.fill(state)
    torch.save(state, tmp_path / "alexnet-owt-7be5be79.pth")
    net = load_lpips(tmp_path / "alexnet-owt-7be5be79.pth")
    assert net.name == "alex"
    assert sum(parameter.numel() for parameter in net.features.parameters()) == 2_469_696  # of alexnet().features
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: alexnet)
    reference = theirs._LPIPS(pretrained=False, net="alex")
    weights = Path(theirs.__file__).parent / "lpips_models" / "alex.pth"
    reference.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=False)
    images, targets = torch.rand(3, 3, 40, 36), torch.rand(3, 3, 40, 36)
    expected = reference(images, targets, normalize=True).flatten()
    assert expected.min() > 1e-4
    torch.testing.assert_close(lpips_each(net, images, targets), expected, rtol=1e-3, atol=1e-6)
    assert lpips_extractor(net).name == "alexnet with lpips heads 0.1"
    with pytest.raises(ValueError, match="at least 31 pixels"):
        net(torch.rand(1, 3, 30, 30), torch.rand(1, 3, 30, 30))


def test_mobilenet_gives_what_that_of_transformers_gives(seeded, tmp_path):
    """Its weights, renamed by their order, in the layout of mobilenet_v2-b0353104.pth."""
    config = MobileNetV2Config(
        tf_padding=False, image_size=224, layer_norm_eps=1e-5, finegrained_output=True, num_labels=1000
    )
    reference = MobileNetV2ForImageClassification(config).eval()
    own = MobileNetV2()
    assert sum(parameter.numel() for parameter in own.parameters()) == 3_504_872  # of torchvision's mobilenet_v2()
    state = {name: tensor for name, tensor in reference.state_dict().items() if not name.endswith("tracked")}
    for name, tensor in state.items():
        fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
        torch.nn.init.normal_(tensor, std=(2 / fan_in) ** 0.5) if tensor.ndim > 1 else tensor.fill_(1.0)
        if name.endswith(("bias", "running_mean")):
            torch.nn.init.normal_(tensor, std=0.1)
    reference.load_state_dict(state, strict=False)
    names = list(own.state_dict())
    file = dict(zip(names[:-2], [state[name] for name in state][: len(names) - 2], strict=True))
    file |= {f"classifier.1.{name}": state[f"classifier.{name}"] for name in ("weight", "bias")}
    torch.save(file, tmp_path / "mobilenet_v2-b0353104.pth")
    net = load_encoder(tmp_path / "mobilenet_v2-b0353104.pth")
    extract, images = encoder_extractor(net), torch.rand(2, 3, 224, 224)
    pixels = (images - net.mean) / net.std
    with torch.no_grad():
        expected = reference.mobilenet_v2(pixel_values=pixels).pooler_output
    assert extract.name == "mobilenet"
    assert extract(images).shape == (2, 1280)
    torch.testing.assert_close(extract(images), expected, rtol=1e-3, atol=1e-4)


def test_any_vision_model_of_transformers_is_an_encoder(tmp_path):
    """Resized and normalised as its folder says."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8, "image_size": 24}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path)
    asks = {"crop_size": {"height": 16, "width": 16}, "image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 3.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(asks))
    extract = encoder_extractor(load_encoder(tmp_path))
    images = torch.rand(3, 3, 16, 16)
    pixels = (images - torch.tensor(asks["image_mean"]).view(3, 1, 1)) / torch.tensor(asks["image_std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path)(pixel_values=pixels).last_hidden_state[:, 0]
    assert extract.name == "dinov2"
    assert "16" in extract.protocol
    torch.testing.assert_close(extract(images), expected, rtol=1e-3, atol=1e-5)
    assert extract(torch.rand(2, 3, 40, 40)).shape == (2, 16)


def test_what_is_no_image_encoder_is_refused(vgg_file, tmp_path):
    with pytest.raises(ValueError, match=r"left over.*mobilenet_v2-b0353104"):
        load_encoder(vgg_file)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it reads input_ids"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no image encoder that transformers can load"):
        load_encoder(tmp_path)


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
