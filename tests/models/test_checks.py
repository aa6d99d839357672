"""What networks refuse, and that a training step does not wait for a GPU to do so."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dalle_pytorch.errors import UserError
from dalle_pytorch.models import checks
from dalle_pytorch.models.checks import check_ids, require
from dalle_pytorch.models.clip import CLIP, CLIPConfig
from dalle_pytorch.models.discrete_vae import DiscreteVAE, DiscreteVAEConfig
from dalle_pytorch.models.openai_dvae import OpenAIDVAE, OpenAIDVAEConfig
from dalle_pytorch.models.vq_vae import VQVAE, VQVAEConfig
from dalle_pytorch.models.vqgan import VQGAN, VQGANConfig

TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
IMAGE = torch.arange(32).reshape(2, 16) * 5 % 12
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal")
"""Operators whose results the CPU needs before it can go on."""


class Waits(TorchDispatchMode):
    """Notes the operators for which a GPU is waited for; to index by a mask is one, for it needs ``nonzero``."""

    def __init__(self):
        super().__init__()
        self.seen, self.found = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen += 1
        by_mask = name in ("index", "index_put_", "index_put") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.found += [name] if name in WAITS or by_mask else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["dalle", "contrast", "dalle_bart", "clip"])
def test_a_training_step_does_not_wait_for_its_device(what, make_dalle, make_bart, tiny_clip, monkeypatch):
    """The CPU, with the checks of a GPU."""
    monkeypatch.setattr(checks, "ASYNCHRONOUS", ("cpu",))
    if what == "clip":
        net, inputs = tiny_clip, (TEXT, torch.rand(2, 3, 16, 16))
    elif what == "dalle_bart":
        net, inputs = make_bart(caption_dropout=0.1), (TEXT + 3, IMAGE)
    else:
        settings = {"contrast_weight": 0.3} if what == "contrast" else {}
        net = make_dalle(
            attn_types=["full", "axial_col"], caption_dropout=0.1, token_dropout=0.1, z_loss=1e-4, **settings
        )
        inputs = (TEXT, IMAGE)
    wrong = {"wrong_text": TEXT.flip(0)} if what == "contrast" else {}
    net.train().loss(*inputs, **wrong)  # tables of attention patterns are made once
    with Waits() as waits:
        net.loss(*inputs, **wrong).loss.backward()
    assert waits.seen > 100
    assert waits.found == []
    with pytest.raises(RuntimeError, match=r"checks\.py"):  # the checks are there all the same
        net.loss(inputs[0] + 1000, inputs[1])


def test_to_wait_is_seen():
    with Waits() as waits:
        check_ids(TEXT, 6, "text")
        TEXT[TEXT > 0]
    assert waits.found == ["_local_scalar_dense", "index"]


VQGAN_CONFIG = VQGANConfig(
    image_size=16, ch=32, ch_mult=[1, 1], num_res_blocks=1, attention_levels=[], z_channels=8, embed_dim=4,
    codebook_size=12,
)  # fmt: skip
NARROW = {"image_size": 16, "num_layers": 2, "codebook_size": 12, "codebook_dim": 8, "hidden_dim": 16}
READERS = {
    "dvae": lambda: DiscreteVAE(DiscreteVAEConfig(**NARROW)).encode,
    "vq_vae": lambda: VQVAE(VQVAEConfig(**NARROW)).encode,
    "openai_dvae": lambda: (
        OpenAIDVAE(OpenAIDVAEConfig(image_size=16, hidden_dim=16, init_dim=8, codebook_size=32)).encode
    ),
    "vqgan": lambda: VQGAN(VQGAN_CONFIG).encode,
    "clip": lambda: CLIP(CLIPConfig(image_size=16, patch_size=8, visual_enc_depth=1, text_enc_depth=1)).encode_image,
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("reader", READERS)
def test_images_that_are_no_floats_in_0_to_1_are_refused(reader):
    read, images = READERS[reader](), torch.rand(2, 3, 16, 16)
    with pytest.raises(UserError, match=r"torch\.uint8 given.*divide by 255"):
        read((images * 255).byte())
    with pytest.raises(UserError, match=r"pixels from 0\.\d+ to 25\d\.\d+ given.*divide 0 to 255 by 255"):
        read(images * 255)
    images[1, 2, 3, 4] = float("nan")
    with pytest.raises(UserError, match="images with NaN given"):
        read(images)
    if reader != "clip":
        expected = read(torch.zeros(2, 3, 16, 16))
        torch.testing.assert_close(read(torch.zeros(2, 3, 16, 16, dtype=torch.float64)), expected)
    assert len(read(torch.randn(2, 3, 16, 16))) == 2  # as in the README of DALLE-pytorch


@pytest.mark.parametrize("wait", [True, False])
def test_ids_out_of_range_are_named_on_a_cpu(wait):
    check_ids(TEXT, 6, "text", wait=wait)
    check_ids(TEXT[:0], 1, "text", wait=wait)
    with pytest.raises(ValueError, match=r"text tokens span \[0, 5\], the vocabulary has ids 0 to 4"):
        check_ids(TEXT, 5, "text", wait=wait)
    with pytest.raises(ValueError, match=r"image tokens span \[-1, 10\], the codebook has ids 0 to 11"):
        check_ids(IMAGE - 1, 12, "image", wait=wait)
    with pytest.raises(ValueError, match="so"):
        require(torch.tensor(False), lambda: "so", wait=wait)
