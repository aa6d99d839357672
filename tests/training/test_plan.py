"""Plans: exact counts, bytes that a real step keeps, refusals with a way out."""

import re
import sys

import pytest
import torch

from dalle_pytorch import DALLE, DALLEConfig
from dalle_pytorch.commands import train_dalle
from dalle_pytorch.models.transformer import ForeignConfig
from dalle_pytorch.training.plan import HardwareConfig, Sizes, flops, matrices, memory, parameters, saved, skeleton


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path):
    """Run train_dalle.py plan=true; returns exit code, output and errors."""

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_dalle.py", "plan=true", *arguments])
        code = 0
        try:
            train_dalle.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        assert not list(tmp_path.glob("runs/*/*")), "a plan leaves no folder"
        return code, captured.out, captured.err

    return run


def make(**settings):
    config = {"dim": 64, "depth": 3, "heads": 2, "head_dim": 32, "text_vocab_size": 50, "text_len": 7, **settings}
    return DALLEConfig(**config), HardwareConfig(image_size=32, grid_size=4, codebook_size=20)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gated": False, "positions": "learned"},
        {"tie_embeddings": True},
        {"shared_attn_ids": [0, 0, 1]},
        {"foreign": ForeignConfig(bos=False, qkv_bias=True), "positions": "flat"},
        {"foreign": ForeignConfig(layer_scale=True, reversible=True, head_bias=True), "tie_embeddings": True},
    ],
)
def test_counts_are_those_of_the_model(settings):
    config, hardware = make(**settings)
    real = DALLE(config, vae=Sizes(32, 4, 20))
    skeletal = skeleton(config, None, hardware)
    assert all(p.is_meta for p in skeletal.parameters())
    assert sum(parameters(skeletal).values()) == sum(p.numel() for p in real.parameters())


def test_the_papers_model_has_12_billion_weights(plan):
    """12 * 64 * 3968 ** 2 in blocks; the rest are embeddings, heads, norms and biases."""
    code, output, _ = plan("experiment=paper_12b", "hardware.gpus=64")
    assert code == 0
    assert "parameters: 12,293,095,168" in output
    assert "47 axial_row, 16 axial_col, 1 conv_like" in output
    assert 12 * 64 * 3968**2 == 12_092_178_432
    assert "* fsdp + checkpoint_activations" in output


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("patterns", [["full"], ["axial_row", "axial_col"]])
@pytest.mark.parametrize(
    "settings", [{}, {"foreign": ForeignConfig(reversible=True, layer_scale=True, rotate_values=True)}]
)
def test_bytes_are_those_that_a_step_keeps(half, patterns, settings):
    """Found on tensors without memory; counted here on real ones, with autograd's hooks around the real model."""
    config, hardware = make(attn_types=patterns, **settings)
    net = DALLE(config, vae=Sizes(32, 4, 20)).train()
    found = {}
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive = []
    x = torch.randn(2, 7 + 16, 64, requires_grad=True)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        net.transformer(x, net.views())
    taken = sum(size for place, size in found.items() if place not in weights)
    skeletal = skeleton(config, None, hardware)
    casts = 2 * matrices(skeletal) if half else 0
    assert saved(skeletal, 2, half=half)[0] + casts == pytest.approx(taken, rel=0.02)


def test_arithmetic_has_a_closed_form():
    """One layer of full attention: 16 d^2 multiplications a token, 2 s^2 / 2 d of attention, twice d V of heads."""
    config, hardware = make(depth=1)
    blocks, heads = flops(skeleton(config, None, hardware))
    length = 7 + 16
    pairs = length * (length + 1) / 2
    assert blocks == 3 * (2 * 16 * 64**2 * length + 4 * 64 * pairs)
    assert heads == 3 * 2 * 64 * (57 * 7 + 20 * 16)


def test_wrong_captions_double_the_blocks_and_what_they_keep():
    plain, contrast = (skeleton(make(contrast_weight=weight)[0], None, make()[1]) for weight in (0.0, 0.3))
    assert flops(contrast)[0] == 2 * flops(plain)[0]
    assert flops(contrast)[1] - flops(plain)[1] == 3 * 2 * 64 * 2 * 20 * 16  # the image head twice more
    how = {"gpus": 1, "sharded": False, "half": False, "checkpointing": False, "averaged": True}
    assert memory(contrast, 4, **how).activations == memory(plain, 8, **how).activations


def test_sharding_divides_and_checkpointing_saves():
    config, hardware = make(depth=8, dim=256)
    net = skeleton(config, None, hardware)
    settings = {"gpus": 4, "half": False, "averaged": True}
    whole = memory(net, 8, sharded=False, checkpointing=False, **settings)
    shared = memory(net, 8, sharded=True, checkpointing=False, **settings)
    assert shared.weights == whole.weights / 4
    assert shared.optimiser == whole.optimiser / 4
    assert memory(net, 8, sharded=False, checkpointing=True, **settings).activations < whole.activations / 3


def test_a_plan_that_cannot_fit_is_refused_with_what_would(plan):
    code, output, error = plan("experiment=paper_12b")
    assert code == 1
    assert output == ""
    assert re.search(r"needs 2\d\d\.\d GB on each GPU, which has 76\.0 GB free", error)
    assert "data.micro_batch_size=16 fits" in error
    code, _, error = plan("experiment=paper_12b", "trainer=ddp", "data.batch_size=8")
    assert code == 1
    assert "fsdp + checkpoint_activations" in error.splitlines()[-1]
    assert plan("experiment=paper_12b", "data.micro_batch_size=16")[0] == 0
    code, _, error = plan("experiment=paper_100m", "hardware.gpus=7")
    assert code == 1
    assert "multiple of hardware.gpus (7)" in error
    assert plan("hardware.utilisation=40")[0] == 2


def test_sizes_of_a_checkpoint_take_the_place_of_the_plans(plan, tiny_vae, tmp_path):
    import dalle_pytorch

    dalle_pytorch.save(tiny_vae, tmp_path / "vae.safetensors")
    code, output, _ = plan("model=tiny", f"vae={tmp_path}/vae.safetensors")
    assert code == 0
    assert "16 image tokens" in output
    assert "image tokenizer (frozen)" in output
