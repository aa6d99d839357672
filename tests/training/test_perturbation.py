"""Decoder post-training: other tokens, as many and of the kind asked for; what gives images their tokens rests."""

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.commands import export, train_vae
from dalle_pytorch.models.vq_vae import FSQConfig
from dalle_pytorch.text import BPETokenizer
from dalle_pytorch.training.perturbation import Perturbation, PerturbationConfig, load_dalle, nearest_codes
from dalle_pytorch.training.vae import make_vae


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    config = FSQConfig(image_size=16, num_layers=2, hidden_dim=16, num_resnet_blocks=1, levels=[5, 5])
    return make_vae(config).eval()


@pytest.fixture(scope="module")
def dalle(vae):
    """Untrained, with the tokenizer."""
    tokenizer = BPETokenizer.train(["a red square", "a blue square"], 270)
    config = dalle_pytorch.DALLEConfig(dim=16, depth=1, heads=2, text_len=8).fitted(vae, tokenizer)
    dalle = config.build(vae).eval()
    dalle.text_tokenizer = tokenizer
    return dalle


@pytest.fixture(scope="module")
def files(vae, dalle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    dalle_pytorch.save(vae, folder / "vae.safetensors")
    dalle_pytorch.save(dalle, folder / "dalle.safetensors")
    return folder


def settings(shards, out, *more):
    return [
        "trainer=cpu", "data.batch_size=4", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1",
        "trainer.enable_progress_bar=false", "callbacks.picture_every=4", "callbacks.checkpoint_every=4",
        "callbacks.keep=last", f"data.path={shards}", f"out={out}", "trainer.max_steps=8", *more,
    ]  # fmt: skip


def test_neighbours_are_the_nearest_codes(vae):
    """On a grid of two coordinates they differ by a step in one of them."""
    grid = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    found = nearest_codes(grid, 2)
    assert ((grid[found] - grid[:, None]).abs().sum(dim=2) == 1).all()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_as_many_tokens_as_asked_for_are_neighbours(vae, share):
    perturbation = Perturbation(PerturbationConfig(share=share, neighbours=3), vae)
    tokens = torch.randint(25, (200, 16))
    others = perturbation(tokens, [], torch.Generator().manual_seed(0))
    changed = others != tokens
    assert changed.float().mean().item() == pytest.approx(share, abs=0.03)
    near = nearest_codes(vae.code_vectors(), 3)
    assert (near[tokens[changed]] == others[changed][:, None]).any(dim=1).all()
    assert torch.equal(others, perturbation(tokens, [], torch.Generator().manual_seed(0)))


def test_a_dalle_draws_the_others_given_the_tokens_before(vae, dalle):
    """By its own probabilities: of a thousand copies each position has its distribution."""
    perturbation = Perturbation(PerturbationConfig(share=1.0, dalle="given"), vae, dalle)
    tokens, captions = torch.randint(25, (1, 16)).expand(1000, -1), ["a red square"] * 1000
    others = perturbation(tokens, captions, torch.Generator().manual_seed(0))
    text = dalle.text_tokenizer.tokenize(captions[:1], 8)
    with torch.no_grad():
        expected = dalle.image_logits(text, tokens[:1, :-1]).softmax(dim=-1)[0]
    drawn = torch.nn.functional.one_hot(others, 25).float().mean(dim=0)
    assert (drawn - expected).abs().max() < 0.06
    assert not dict(perturbation.named_parameters())


@pytest.mark.parametrize("by_dalle", [False, True])
def test_post_training_leaves_encoder_and_codes_as_they_are(shards, files, tmp_path, run_command, by_dalle):
    more = [f"perturbation.dalle={files}/dalle.safetensors"] if by_dalle else []
    source = "dalle" if by_dalle else "vae"
    arguments = settings(shards, tmp_path / "run", f"init={files}/{source}.safetensors", "perturbation.share=0.5")
    run_command(train_vae.main, *arguments, *([] if by_dalle else ["perturbation.neighbours=4"]), *more)
    before = dalle_pytorch.load(files / "vae.safetensors").state_dict()
    vae = dalle_pytorch.load(tmp_path / "run/vae.safetensors")
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("decoder."), name
    assert list((tmp_path / "run/pictures").iterdir())


def test_a_dalle_takes_the_decoder_over(shards, files, tmp_path, run_command):
    """What it draws are the same tokens, decoded otherwise; another tokenizer is refused."""
    arguments = settings(shards, tmp_path / "run", f"init={files}/vae.safetensors", "perturbation.share=0.5")
    run_command(train_vae.main, *arguments, "perturbation.neighbours=4")
    out = tmp_path / "dalle.safetensors"
    run_command(export.main, f"weights={files}/dalle.safetensors", f"vae={tmp_path}/run/vae.safetensors", f"out={out}")
    a, b = (dalle_pytorch.load(path) for path in (files / "dalle.safetensors", out))
    assert torch.equal(a.image_head.weight, b.image_head.weight)
    new = dalle_pytorch.load(tmp_path / "run/vae.safetensors").state_dict()
    assert all(torch.equal(tensor, new[name]) for name, tensor in b.vae.state_dict().items())
    other = make_vae(FSQConfig(image_size=16, num_layers=2, hidden_dim=16, num_resnet_blocks=1, levels=[5, 5]))
    dalle_pytorch.save(other, tmp_path / "other.safetensors")
    code, error = run_command(
        export.main, f"weights={files}/dalle.safetensors", f"vae={tmp_path}/other.safetensors", f"out={tmp_path}/x"
    )
    assert code == 1
    assert "other tokens" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["perturbation.share=0.5"], "say which with init="),
        (["perturbation.share=2"], "share must lie in [0, 1]"),
        (["perturbation.dalle=x"], "while share is 0"),
        (["perturbation.neighbours=4"], "leave it out"),
        (["init=VAE", "perturbation.share=0.5", "kl_weight.end=1"], "rest in post-training"),
        (["init=VAE", "perturbation.share=0.5", "perturbation.neighbours=25"], "must be below the 25 codes"),
        (["init=VAE", "model.hidden_dim=8"], "leave model.hidden_dim out"),
        (["init=nothing.safetensors"], "nothing.safetensors"),
    ],
)
def test_settings_that_make_no_sense_are_refused(shards, files, tmp_path, run_command, more, message):
    more = [item.replace("VAE", f"{files}/vae.safetensors") for item in more]
    code, error = run_command(train_vae.main, *settings(shards, tmp_path / "run", *more))
    assert code != 0
    assert message in error


def test_a_second_round_begins_with_the_first_ones_decoder(files):
    """The DALLE still has the old one, whose tokens are the same."""
    vae = dalle_pytorch.load(files / "vae.safetensors")
    with torch.no_grad():
        vae.decoder[0].weight.add_(1)
    assert load_dalle(str(files / "dalle.safetensors"), vae).text_tokenizer is not None


def test_a_dalle_of_other_tokens_is_refused(files):
    torch.manual_seed(1)
    other = make_vae(FSQConfig(image_size=16, num_layers=2, hidden_dim=16, num_resnet_blocks=1, levels=[5, 5]))
    with pytest.raises(ValueError, match="has another image tokenizer"):
        load_dalle(str(files / "dalle.safetensors"), other)
