"""Calls of DALLE-pytorch's users that are done right or refused early, and the names that they import."""

import copy
import subprocess
import sys

import pytest
import torch

import dalle_pytorch
from dalle_pytorch.compat.dalle_pytorch import DALLE, DiscreteVAE, top_k_of_filter_thres
from dalle_pytorch.errors import UserError
from dalle_pytorch.text import BPETokenizer


@pytest.fixture
def dalle():
    vae = DiscreteVAE(image_size=16, num_layers=2, num_tokens=12, codebook_dim=8, hidden_dim=8)
    return DALLE(vae=vae, dim=32, depth=1, heads=1, dim_head=16, num_text_tokens=270, text_seq_len=6)


def test_prompts_are_read_by_the_models_tokenizer_one_image_each(dalle):
    with pytest.raises(UserError, match="carries no tokenizer"):
        dalle.generate_images(["a cat", "a dog"])
    dalle.text_tokenizer = BPETokenizer.train(["a cat", "a dog"], 270)
    tokens = dalle.text_tokenizer.tokenize(["a cat", "a dog"], 6)
    draw = lambda text: dalle.generate_images(text, generator=torch.Generator().manual_seed(0))  # noqa: E731
    assert torch.equal(draw(["a cat", "a dog"]), draw(tokens))
    assert torch.equal(draw("a cat"), draw(tokens[:1]))


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (torch.ones(1, 6), {}, r"whole numbers \[b, t\], got torch.float32"),
        (torch.ones(6, dtype=torch.long), {}, r"whole numbers \[b, t\].*\(6,\)"),
        (torch.ones(0, 6, dtype=torch.long), {}, "no captions"),
        (torch.full((1, 6), 270), {}, r"\[270, 270\].*ids 0 to 269"),
        (torch.ones(2, 6, dtype=torch.long), {"img": torch.rand(1, 3, 16, 16)}, "1 images given as img for 2 captions"),
        (torch.ones(1, 6, dtype=torch.long), {"img": torch.rand(1, 3, 16, 16) * 255}, "divide 0 to 255 by 255"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_drawn(dalle, monkeypatch, text, settings, message):
    monkeypatch.setattr("dalle_pytorch.compat.dalle_pytorch.generate_image_tokens", None)
    with pytest.raises(ValueError, match=message):
        dalle.generate_images(text, **settings)


@pytest.mark.parametrize("pattern", ["sparse", "mlp"])
def test_patterns_that_are_not_here_are_named(dalle, pattern):
    with pytest.raises(UserError, match=rf"attn_types has {pattern}, .*there are full, axial_row"):
        DALLE(vae=dalle.vae, attn_types=("full", pattern))


def test_sizes_have_dalle_pytorchs_names(dalle):
    """The text ids count those that fill short captions, one for each position."""
    assert (dalle.text_seq_len, dalle.image_seq_len, dalle.total_seq_len) == (6, 16, 22)
    assert (dalle.num_text_tokens, dalle.total_tokens) == (276, 288)


def test_weights_under_dalle_pytorchs_names_are_refused_with_the_way_to_read_them(dalle):
    for net, name in ((dalle, "to_logits.1.weight"), (dalle.vae, "encoder.0.0.weight")):
        with pytest.raises(UserError, match=r"dalle_pytorch\.load"):
            net.load_state_dict({name: torch.zeros(1)})
        net.load_state_dict(net.state_dict())


def test_modules_have_dalle_pytorchs_names():
    from dalle_pytorch.dalle_pytorch import DALLE as named
    from dalle_pytorch.tokenizer import ChineseTokenizer, HugTokenizer, SimpleTokenizer, YttmTokenizer, tokenizer
    from dalle_pytorch.vae import OpenAIDiscreteVAE, VQGanVAE

    assert named is DALLE
    assert (OpenAIDiscreteVAE, VQGanVAE) == (dalle_pytorch.OpenAIDiscreteVAE, dalle_pytorch.VQGanVAE)
    assert isinstance(tokenizer, SimpleTokenizer)
    assert tokenizer.tokenize(["a cat"], 4).tolist() == [[320, 2368, 0, 0]]
    assert dalle_pytorch.__version__[0].isdigit()
    assert all(callable(kind) for kind in (ChineseTokenizer, HugTokenizer))
    with pytest.raises(UserError, match="BPETokenizer"):
        YttmTokenizer("model.yttm")


@pytest.mark.parametrize(
    ("line", "successor"),
    [
        ("from dalle_pytorch.loader import TextImageDataset", "prepare_data.py source=folder"),
        ("from dalle_pytorch import distributed_utils", "trainer.strategy="),
        ("from dalle_pytorch import VQGanVAE1024", r"VQGanVAE\(\)"),
    ],
)
def test_names_that_are_not_here_name_their_successor(line, successor):
    with pytest.raises(ImportError, match=successor):
        exec(line)


def test_unknown_names_are_unknown_as_ever():
    assert not hasattr(dalle_pytorch, "DALEE")
    with pytest.raises(ImportError, match="cannot import name 'DALEE'"):
        exec("from dalle_pytorch import DALEE")


def test_the_package_does_not_import_what_only_old_names_need():
    code = """
import sys, dalle_pytorch
print([name for name in ("tokenizer", "vae", "loader") if f"dalle_pytorch.{name}" in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_model_is_laid_out_once_for_all_calls_until_a_weight_changes(make_dalle):
    dalle = make_dalle().eval()
    text = torch.tensor([[3, 1, 4]])
    draw = lambda model: model.generate_images(text, generator=torch.Generator().manual_seed(0))  # noqa: E731
    before = draw(dalle)
    kept = dalle.laid_out("fp32", False)
    assert dalle.laid_out("fp32", False) is kept
    assert dalle.laid_out("bf16", False) is not kept
    copied = copy.deepcopy(dalle)
    assert copied._laid_out is None
    torch.testing.assert_close(draw(copied), before)
    for weight in dalle.transformer.parameters():
        weight.data.mul_(3)  # which leaves no trace but the numbers
    after = draw(dalle)
    assert not torch.allclose(after, before)
    fresh = make_dalle().eval()
    fresh.load_state_dict(dalle.state_dict())
    torch.testing.assert_close(draw(fresh), after)
    dalle.train()
    assert dalle.laid_out("fp32", False) is not dalle.laid_out("fp32", False)


@pytest.mark.parametrize(("thres", "kept"), [(0.0, 1024), (0.5, 512), (0.9, 102), (0.7, 307), (1.0, 1)])
def test_filter_thres_is_a_share_of_the_image_vocabulary(thres, kept):
    assert top_k_of_filter_thres(thres, 1024) == kept
    with pytest.raises(ValueError, match="filter_thres"):
        top_k_of_filter_thres(1.2, 8)
