"""Other codebooks: codes are what they say, gradients reach who they should, training finds colours."""

import math

import pytest
import torch
from vector_quantize_pytorch import LFQ

import dalle_pytorch
from dalle_pytorch.models.image_tokenizer import margin_of, token_edges
from dalle_pytorch.models.mode import eval_mode
from dalle_pytorch.models.quantizers import CODEBOOKS, LikeliestCode, NearestCode, SignBits, to_grid, to_sequence
from dalle_pytorch.models.vq_vae import VQVAE, FSQConfig, VQVAEConfig

SETTINGS = {
    "ema": {"quantizer": "ema", "codebook_size": 30},
    "fsq": {"quantizer": "fsq", "levels": [5, 3], "codebook_size": 15},
    "ibq": {"quantizer": "ibq", "codebook_size": 30, "entropy": 0.0},
    "lfq": {"quantizer": "lfq", "codebook_size": 32},
    "bsq": {"quantizer": "bsq", "codebook_size": 32},
}


@pytest.fixture(params=CODEBOOKS)
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


@pytest.mark.parametrize(
    ("size", "strides", "grid"), [(16, [2, 3], 3), (16, [3, 2], 3), (64, [2, 3], 11), (64, [5], 13), (12, [3, 2], 2)]
)
@pytest.mark.parametrize("taper", [False, True])
def test_strides_give_grids_that_do_not_divide_the_picture(size, strides, grid, taper):
    vae = make("fsq", image_size=size, strides=strides, taper=taper).eval()
    images = torch.rand(2, 3, size, size)
    tokens = vae.encode(images)
    assert tokens.shape == (2, grid**2)
    with torch.no_grad():
        assert vae.decode(tokens).shape == images.shape


def test_a_token_of_a_strided_grid_sees_and_paints_its_own_place():
    """Without blocks a token's field is its cell and a little more: a corner's never reaches the other corner."""
    vae = make("fsq", image_size=64, strides=[2, 3], num_resnet_blocks=0).eval()
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    features = vae.encoded(images)
    features[0, :, 0, 0].sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, :5, :5].abs().min() > 0
    assert images.grad[0, :, 10:].abs().max() == 0
    assert images.grad[0, :, :, 10:].abs().max() == 0
    edges = token_edges(64, 11, margin_of(vae))
    assert (edges[:3], edges[-2:]) == ([0, 5, 11], [59, 64])
    vectors = torch.randn(1, 8, 11, 11, requires_grad=True)
    vae.decoded(vectors)[0, :, -5:, -5:].sum().backward()
    assert vectors.grad is not None
    assert vectors.grad[0, :, 10, 10].abs().max() > 0
    assert vectors.grad[0, :, :9].abs().max() == 0


@pytest.mark.parametrize("strides", [[1], [2, 0]])
def test_strides_below_two_are_refused(strides):
    with pytest.raises(ValueError, match="strides must be 2 or more"):
        make("fsq", strides=strides)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_training_sees_the_codes_of_encode_and_the_pictures_of_decode(vae, dtype):
    """Also in mixed precision: the encoder's features are rounded in both, the choice among codes in neither."""
    images = torch.rand(16, 3, 16, 16)
    with eval_mode(vae), torch.autocast("cpu", dtype, enabled=dtype is not None):
        found, features = vae.loss(images), vae.encoded(images).float()
    with eval_mode(vae):
        assert torch.equal(vae.quantizer(to_sequence(features)).image_tokens, found.image_tokens)
        if dtype is None:
            assert torch.equal(vae.encode(images), found.image_tokens)
            output = vae.decoded(to_grid(vae.quantizer.vectors(found.image_tokens), vae.grid_size))
            torch.testing.assert_close(vae.reconstruction_error(output, images), found.reconstruction)
            assert torch.equal(vae.to_pixels(output), vae.decode(found.image_tokens))


def test_a_checkpoint_of_an_earlier_version_calls_ema_vq():
    assert VQVAEConfig(quantizer="vq").quantizer == "ema"


def test_a_grid_fills_the_size_of_its_codebook():
    assert FSQConfig().codebook_size == 1000
    assert FSQConfig(levels=[3, 5]).codebook_size == 15


@pytest.mark.parametrize("quantizer", ["lfq", "bsq"])
def test_signs_are_codes(quantizer):
    """As many as there are, each its own nearest, each a corner of a cube."""
    found = make(quantizer).eval().quantizer
    tokens = torch.arange(32).view(1, -1)
    codes = found.table[tokens]
    assert codes.shape == (1, 32, 5)
    assert len(codes[0].unique(dim=0)) == 32
    torch.testing.assert_close(codes.norm(dim=-1), torch.full((1, 32), 1.0 if quantizer == "bsq" else 5**0.5))
    found.project_in = torch.nn.Identity()
    assert torch.equal(found(3 * codes).image_tokens, tokens)
    torch.testing.assert_close(found(3 * codes).vectors, found.vectors(tokens))


def test_lfq_is_that_of_vector_quantize_pytorch():
    """Codes, gradients and loss, in one process."""
    own = SignBits(32, 8, spherical=False, commitment=0.3, entropy=0.7).train()
    theirs = LFQ(dim=8, codebook_size=32, commitment_loss_weight=0.3, entropy_loss_weight=0.7).train()
    for name in ("project_in", "project_out"):
        getattr(theirs, name).load_state_dict(getattr(own, name).state_dict())
    z = [torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    found, (vectors, _, loss) = own(z[0]), theirs(z[1])
    torch.testing.assert_close(found.vectors, vectors)
    torch.testing.assert_close(found.loss, loss, rtol=1e-3, atol=1e-4)  # theirs cuts logarithms off
    (found.vectors.square().sum() + found.loss).backward()
    (vectors.square().sum() + loss).backward()
    torch.testing.assert_close(z[0].grad, z[1].grad, rtol=1e-2, atol=1e-3)


def test_the_activation_of_ifsq_is_the_authors():
    """It makes normal numbers uniform, as they say; the levels are those of the formula."""
    z, distance = torch.randn(1, 20_000, 2), {}
    for activation in ("tanh", "ifsq"):
        grid = make("fsq", activation=activation, levels=[5, 5], codebook_size=25).eval().quantizer
        grid.grid.project_in = torch.nn.Identity()
        bounded = torch.tanh(z) if activation == "tanh" else 2 * torch.sigmoid(1.6 * z) - 1
        levels = (bounded * 2 * 1.001).round()  # five levels, -2 to 2; the library widens the range by 1e-3
        assert torch.equal((levels[..., 0] + 2 + 5 * (levels[..., 1] + 2)).long(), grid(z).image_tokens)
        ordered = bounded.flatten().sort().values
        distance[activation] = (ordered - torch.linspace(-1, 1, len(ordered))).abs().max().item()
    assert distance["ifsq"] < 0.05 < distance["tanh"]


def test_a_batch_that_is_not_finite_leaves_the_codebook_as_it_was():
    vae = make("ema").train()
    before = {name: tensor.clone() for name, tensor in vae.quantizer.state_dict().items()}
    vae.encoder[0].bias.data.fill_(math.nan)
    vae.loss(torch.rand(4, 3, 16, 16))
    vae.encoder[0].bias.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.quantizer.state_dict().items())
    vae.loss(torch.rand(4, 3, 16, 16))
    assert not all(torch.equal(tensor, before[name]) for name, tensor in vae.quantizer.state_dict().items())


def test_the_entropy_term_of_ibq_wants_sure_choices_and_all_codes_in_use():
    def term(logits):
        plain, with_term = (LikeliestCode(4, 4, commitment=0.0, entropy=entropy).train() for entropy in (0.0, 1.0))
        for quantizer in (plain, with_term):
            quantizer.codes.data = torch.eye(4)
        return (with_term(logits[None]).loss - plain(logits[None]).loss).item()

    sure_and_spread, sure_and_alike, unsure = 50 * torch.eye(4), 50 * torch.eye(4)[:1].expand(4, 4), torch.zeros(4, 4)
    assert term(sure_and_spread) == pytest.approx(-math.log(4), abs=1e-4)
    assert term(sure_and_alike) == pytest.approx(0, abs=1e-4)
    assert term(unsure) == pytest.approx(0, abs=1e-4)
    assert term(0.2 * torch.eye(4)) == pytest.approx(-math.log(4), abs=1e-4)  # short vectors choose as surely


def test_a_plan_knows_every_codebook(vae):
    with torch.device("meta"):
        skeleton = VQVAE(vae.config)
    assert {name: p.shape for name, p in skeleton.named_parameters()} == {n: p.shape for n, p in vae.named_parameters()}


def test_encoding_teaches_the_codebook_nothing(vae):
    vae.train().loss(torch.rand(4, 3, 16, 16))
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    first = vae.encode(torch.rand(4, 3, 16, 16))
    assert vae.training
    assert vae.quantizer.training
    assert first.shape == (4, 16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


def test_gradients_reach_the_encoder(vae):
    vae.train().loss(torch.rand(4, 3, 16, 16)).reconstruction.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.encoder.parameters())


def test_every_code_of_ibq_gets_a_gradient():
    vae = make("ibq").train()
    found = vae.loss(torch.rand(2, 3, 16, 16))
    found.reconstruction.backward()
    assert len(found.image_tokens.unique()) < vae.codebook_size
    assert (vae.quantizer.codes.grad.abs().sum(dim=1) > 0).all()


def test_a_code_of_vq_is_nearest_to_itself():
    quantizer = make("ema").eval().quantizer
    tokens = torch.arange(30).view(1, -1)
    assert torch.equal(quantizer(quantizer.vectors(tokens)).image_tokens, tokens)


def test_idle_codes_of_vq_move_to_the_data():
    used = {}
    for idle in (0.0, 1.0):
        torch.manual_seed(0)
        vae = make("ema", idle=idle, decay=0.5).train()
        codebook = vae.quantizer.codes._codebook
        for table in (codebook.embed, codebook.embed_avg):
            table[:] = table[:, :1]  # all codes are one, and the first of equals is chosen
        for _ in range(20):
            vae.loss(torch.rand(8, 3, 16, 16))
        used[idle] = len(vae.encode(torch.rand(32, 3, 16, 16)).unique())
    assert used[1.0] >= 1.5 * used[0.0], used


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
        ({"quantizer": "rvq"}, "ema, fsq, ibq"),
        ({"quantizer": "lfq", "codebook_size": 1000}, "power of 2"),
        ({"quantizer": "fsq", "levels": [8, 5], "codebook_size": 40, "activation": "relu"}, "tanh, ifsq"),
        ({"quantizer": "fsq"}, "8,5,5,5"),
        ({"quantizer": "fsq", "levels": [8, 5], "codebook_size": 41}, "40 codes"),
        ({"quantizer": "ema", "levels": [8, 5]}, "quantizer=fsq, and this is ema"),
        ({"quantizer": "ibq", "idle": 0.5}, "quantizer=ema, and this is ibq"),
        ({"quantizer": "ema", "entropy": 0.5}, "ibq or lfq or bsq"),
        ({"decay": 1.0}, "decay"),
        ({"commitment": -1.0}, "commitment"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VQVAEConfig(**settings)


def test_a_codebook_that_processes_share_waits_where_one_batch_is_not_finite(monkeypatch):
    """All must leave the step out together: one that went on would wait for sums that never come."""
    reduced = []

    def as_another_process_had(tensor, *_):
        reduced.append(tensor.numel())
        tensor.zero_()  # its batch was not finite

    monkeypatch.setattr(torch.distributed, "all_reduce", as_another_process_had)
    codes = NearestCode(8, 4, decay=0.5, commitment=0.25, idle=0.0).train()
    codes.share()
    before = {name: tensor.clone() for name, tensor in codes.state_dict().items()}
    codes(torch.randn(2, 6, 4))
    assert reduced == [1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in codes.state_dict().items())


@pytest.mark.parametrize(
    ("strides", "edges"), [([5], [0, 3, 8, 13, 16]), ([3, 2], [0, 5, 11, 16]), ([4], [0, 4, 8, 12, 16])]
)
def test_token_edges_by_hand(strides, edges):
    vae = make("fsq", image_size=16, strides=strides)
    assert token_edges(16, vae.grid_size, margin_of(vae)) == edges


def test_networks_without_a_margin_have_none():
    assert margin_of(torch.nn.Identity()) == (0, 0)
    assert token_edges(64, 8) == list(range(0, 65, 8))
