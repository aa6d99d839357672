"""Other codebooks: codes are what they say, gradients reach who they should, training finds colours."""

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.vq_vae import QUANTIZERS, VQVAE, VQVAEConfig

SETTINGS = {
    "vq": {"quantizer": "vq", "codebook_size": 30},
    "fsq": {"quantizer": "fsq", "levels": [5, 3], "codebook_size": 15},
    "ibq": {"quantizer": "ibq", "codebook_size": 30, "entropy": 0.0},
}


@pytest.fixture(params=QUANTIZERS)
def vae(request):
    return make(request.param)


def make(quantizer, **settings):
    sizes = {"image_size": 16, "num_layers": 2, "codebook_dim": 8, "hidden_dim": 16, "num_resnet_blocks": 1}
    return VQVAE(VQVAEConfig(**{**sizes, **SETTINGS[quantizer], **settings}))


def test_codes_lie_in_the_codebook_and_come_back(vae):
    vae.eval()
    images = torch.rand(3, 3, 16, 16)
    tokens = vae.encode(images)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == torch.long
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < vae.codebook_size
    with torch.no_grad():
        pictures = vae.decode(tokens)
    assert pictures.shape == images.shape
    assert 0 <= float(pictures.min()) <= float(pictures.max()) <= 1


def test_decoding_is_what_training_sees(vae):
    images = torch.rand(4, 3, 16, 16)
    vae.train().loss(images)  # a codebook that starts from the data starts here
    with eval_mode(vae):
        found = vae.loss(images)
        error = (vae.decode(found.image_tokens) - images).square().mean()
        assert torch.equal(vae.encode(images), found.image_tokens)
    # mse is taken of pictures in [-1, 1], and pixels that are clamped are nearer
    assert error <= found.reconstruction / 4 + 1e-6


def test_encoding_teaches_the_codebook_nothing(vae):
    vae.train().loss(torch.rand(4, 3, 16, 16))
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    first = vae.encode(torch.rand(4, 3, 16, 16))
    assert vae.training
    assert vae.quantizer.training
    assert first.shape == (4, 16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_gradients_reach_the_encoder(vae):
    vae.train().loss(torch.rand(4, 3, 16, 16)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.encoder.parameters())


def test_every_code_of_ibq_gets_a_gradient():
    vae = make("ibq").train()
    found = vae.loss(torch.rand(2, 3, 16, 16))
    found.reconstruction.backward()
    assert len(found.image_tokens.unique()) < vae.codebook_size
    assert (vae.quantizer.codes.grad.abs().sum(dim=1) > 0).all()


def test_a_code_of_vq_is_nearest_to_itself():
    quantizer = make("vq").eval().quantizer
    tokens = torch.arange(30).view(1, -1)
    assert torch.equal(quantizer(quantizer.vectors(tokens)).image_tokens, tokens)


def test_idle_codes_of_vq_move_to_the_data():
    vae = make("vq", idle=1.0, decay=0.5).train()
    for _ in range(8):
        vae.loss(torch.rand(8, 3, 16, 16))
    used = vae.encode(torch.rand(32, 3, 16, 16)).unique()
    assert len(used) > vae.codebook_size // 2


def test_fsq_has_as_many_codes_as_its_levels_say():
    vae = make("fsq").eval()
    tokens = torch.arange(15).view(1, -1)
    codes = vae.quantizer.grid.implicit_codebook
    assert len(codes.unique(dim=0)) == 15
    torch.testing.assert_close(vae.quantizer.vectors(tokens)[0], vae.quantizer.grid.project_out(codes))


def test_training_tells_colours_apart(vae):
    torch.manual_seed(0)
    colours = torch.rand(6, 3, 1, 1).expand(-1, -1, 16, 16)
    optimiser = torch.optim.Adam(vae.parameters(), lr=3e-3)
    vae.train()
    for _ in range(300):
        optimiser.zero_grad()
        vae.loss(colours).loss.backward()
        optimiser.step()
    vae.eval()
    error = (vae.decode(vae.encode(colours)) - colours).square().mean()
    mean = (colours.mean(dim=0) - colours).square().mean()
    assert error < 0.2 * mean


def test_a_checkpoint_comes_back(vae, tmp_path):
    vae.train().loss(torch.rand(4, 3, 16, 16))
    vae.eval()
    path = tmp_path / "vae.safetensors"
    dalle_pytorch.save(vae, path)
    loaded = dalle_pytorch.load(path, kind="vae")
    images = torch.rand(2, 3, 16, 16)
    tokens = vae.encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), vae.decode(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantizer": "lfq"}, "vq, fsq, ibq"),
        ({"quantizer": "fsq"}, "8,5,5,5"),
        ({"quantizer": "fsq", "levels": [8, 5], "codebook_size": 41}, "40 codes"),
        ({"quantizer": "vq", "levels": [8, 5]}, "leave them empty"),
        ({"decay": 1.0}, "decay"),
        ({"commitment": -1.0}, "commitment"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**settings)
