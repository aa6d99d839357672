"""DALLE-pytorch's users: every Python block of its first README, and the same flows through the surface of 1.6.6."""

import hashlib
import re
from pathlib import Path

import pytest
import torch

import dalle_pytorch
from dalle_pytorch import CLIP, DALLE, DiscreteVAE
from dalle_pytorch.compat import dalle_pytorch as compat

SHA256 = "56e72ad459ff6ee05d81833be2db379c2f364f393350203991cad3521e6418a8"
README = Path(__file__).parent / "data_files" / "dalle_pytorch_0.0.22_readme.md"


def test_first_readme_runs_unchanged(monkeypatch):
    """The blocks as they stand, in order, in one namespace; of an image's 1,024 tokens only the last row is drawn."""
    draw = compat.generate_image_tokens

    def last_row(decoder, text, uniforms, sampling, given_tokens):
        assert given_tokens is None
        dalle = decoder.dalle
        above = torch.randint(dalle.codebook_size, (len(text), dalle.num_image_tokens - dalle.grid_size))
        return draw(decoder, text, uniforms, sampling, given_tokens=above)

    monkeypatch.setattr(compat, "generate_image_tokens", last_row)
    content = README.read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256
    blocks = re.findall(r"```python\n(.*?)```", content.decode(), re.DOTALL)
    assert len(blocks) == 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    assert namespace["images"].shape == (4, 3, 256, 256)  # its comments say 2; its batch is 4
    assert namespace["scores"].shape == (4,)
    assert namespace["mask"].all()


@pytest.fixture
def vae():
    return DiscreteVAE(
        image_size=32,
        num_layers=3,
        num_tokens=24,
        codebook_dim=16,
        hidden_dim=16,
        num_resnet_blocks=1,
        temperature=0.9,
        straight_through=False,
        kl_div_loss_weight=0.1,
    )


def test_vae_of_1_6_6(vae):
    images = torch.rand(3, 3, 32, 32)
    loss = vae(images, return_loss=True)
    loss.backward()
    loss, recons = vae(images, return_loss=True, return_recons=True, temp=0.5)
    assert recons.shape == images.shape
    assert vae(images, return_logits=True).shape == (3, 24, 4, 4)
    reconstruction = vae(images, return_recon_loss=True)
    assert loss > 0
    assert reconstruction > 0
    assert vae(images).requires_grad
    codes = vae.get_codebook_indices(images)
    assert codes.shape == (3, 16)
    torch.testing.assert_close(vae.eval()(images), vae.decode(codes))
    torch.testing.assert_close(vae.norm(images), images * 2 - 1)
    assert DiscreteVAE(64).image_size == 64  # by position
    unnormalised = DiscreteVAE(image_size=16, normalization=None, channels=1, smooth_l1_loss=True)
    assert unnormalised(torch.rand(1, 1, 16, 16), return_loss=True) > 0


def test_vae_settings_survive_saving(vae, tmp_path):
    dalle_pytorch.save(vae, tmp_path / "vae.safetensors")
    loaded = dalle_pytorch.load(tmp_path / "vae.safetensors")
    assert (loaded.temperature, loaded.kl_div_loss_weight) == (0.9, 0.1)


def test_dalle_and_clip_of_1_6_6(vae):
    dalle = DALLE(
        dim=32,
        vae=vae,
        num_text_tokens=20,
        text_seq_len=6,
        depth=4,
        heads=2,
        dim_head=16,
        reversible=True,
        attn_dropout=0.1,
        ff_dropout=0.1,
        attn_types=("full", "axial_row", "axial_col", "conv_like"),
        loss_img_weight=7.0,
        stable=True,
        sandwich_norm=True,
        shift_tokens=True,
        rotary_emb=False,
        shared_attn_ids=(0, 1, 0, 1),
        shared_ff_ids=(0, 0, 1, 1),
        share_input_output_emb=True,
        optimize_for_inference=True,
    )
    text, images = torch.randint(1, 20, (2, 6)), torch.rand(2, 3, 32, 32)
    dalle(text, images, return_loss=True, null_cond_prob=0.2).backward()
    from_tokens = dalle.eval()(text, vae.get_codebook_indices(images), return_loss=True)
    torch.testing.assert_close(from_tokens, dalle(text, images, return_loss=True))
    torch.testing.assert_close(from_tokens, dalle(text, images, True))  # third by position
    assert dalle(text).image.shape == (2, 1, 24)

    clip = CLIP(
        dim_text=16, dim_image=16, dim_latent=16, num_text_tokens=20, text_enc_depth=1, text_seq_len=6, text_heads=2,
        num_visual_tokens=512, visual_enc_depth=1, visual_image_size=32, visual_patch_size=8, visual_heads=2,
    )  # fmt: skip
    clip(text, images, text_mask=torch.ones_like(text).bool(), return_loss=True).backward()
    generated, scores = dalle.generate_images(text, clip=clip, filter_thres=0.9, temperature=0.9, cond_scale=3.0)
    torch.testing.assert_close(scores, clip(text, generated).detach())

    primed = dalle.generate_images(text, img=images, num_init_img_tokens=8, use_cache=True)
    assert primed.shape == images.shape
    with pytest.raises(ValueError, match="0 to 15"):
        dalle.generate_images(text, img=images, num_init_img_tokens=16)


def test_short_prompts_and_explicit_randomness(vae):
    """A prompt shorter than the context is filled with pads, and a generator decides the picture."""
    dalle = DALLE(dim=32, vae=vae, num_text_tokens=20, text_seq_len=6, depth=1, heads=2, dim_head=16).eval()
    short, padded = torch.tensor([[3, 4]]), torch.tensor([[3, 4, 0, 0, 0, 0]])
    pictures = [
        dalle.generate_images(text, generator=torch.Generator().manual_seed(seed))
        for text, seed in ((short, 0), (padded, 0), (short, 1))
    ]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


def test_misuse_is_named(vae):
    with pytest.raises(ValueError, match="full, axial_row"):
        DALLE(dim=32, vae=vae, attn_types=("sparse",))
    dalle = DALLE(dim=32, vae=vae, num_text_tokens=20, text_seq_len=6, depth=1, heads=2, dim_head=16)
    with pytest.raises(ValueError, match="needs an image"):
        dalle(torch.ones(1, 6, dtype=torch.long), return_loss=True)
    with pytest.raises(ValueError, match=r"mask of shape \(1, 5\).*\(1, 6\)"):
        dalle(torch.ones(1, 6, dtype=torch.long), mask=torch.ones(1, 5).bool())


def test_public_names():
    assert {"DALLE", "CLIP", "DiscreteVAE", "Generator", "load", "save"} <= set(dalle_pytorch.__all__)
    for name in dalle_pytorch.__all__:
        assert hasattr(dalle_pytorch, name)
