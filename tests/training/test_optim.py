import copy
import importlib.util

import pytest
import torch
from torch import nn

from dalle_pytorch.training.callbacks import ema
from dalle_pytorch.training.muon import PreciseMuon, orthogonal
from dalle_pytorch.training.optim import (
    KINDS,
    MuonAdamW,
    OptimConfig,
    decay_groups,
    inner_matrices,
    make_optimizer,
    make_scheduler,
)

needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra bnb")
EVERY_KIND = pytest.mark.parametrize("kind", ["adamw", "muon", pytest.param("adamw8bit", marks=needs_bnb)])
TEXT = torch.tensor([[3, 1, 4, 0], [1, 5, 0, 0]])
IMAGE = torch.arange(32).reshape(2, 16) * 5 % 12


def names(net, parameters):
    ids = {id(p) for p in parameters}
    return {name for name, p in net.named_parameters() if id(p) in ids}


def test_only_matrices_that_are_no_embeddings_decay():
    net = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 1, 3))
    with_decay, without = decay_groups(net)
    assert names(net, with_decay) == {"1.weight", "3.weight"}
    assert names(net, without) == {"0.weight", "1.bias", "2.weight", "2.bias", "3.bias"}


def test_a_tied_head_counts_as_an_embedding(make_dalle):
    dalle = make_dalle(tie_embeddings=True)
    with_decay, without = decay_groups(dalle)
    assert dalle.image_head.weight is dalle.image_emb.weight
    assert not any(p is dalle.image_emb.weight for p in with_decay)
    assert sum(p is dalle.image_emb.weight for p in without) == 1


def test_the_frozen_vae_is_not_optimised(make_dalle):
    dalle = make_dalle()
    optimizer = make_optimizer(dalle, OptimConfig())
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in dalle.vae.parameters()}
    assert optimised == {id(p) for n, p in dalle.named_parameters() if not n.startswith("vae.")}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_averages_start_fast_and_reach_their_decay():
    update = ema(0.9)._kwargs["multi_avg_fn"]
    average = [torch.zeros(1)]
    update(average, [torch.ones(1)], 1)
    assert average[0].item() == pytest.approx(1 - 2 / 11)
    average = [torch.zeros(1)]
    update(average, [torch.ones(1)], torch.tensor(10_000))
    assert average[0].item() == pytest.approx(0.1)


def trainable(net):
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def train(dalle, optimizer, steps):
    """Losses of a few steps on one batch."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = dalle.loss(TEXT, IMAGE).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


SETTINGS = [{}, {"tie_embeddings": True, "positions": "learned"}, {"shared_attn_ids": [0], "shared_ff_ids": [0, 1]}]


@EVERY_KIND
@pytest.mark.parametrize("settings", SETTINGS)
def test_every_trainable_parameter_is_in_one_group(make_dalle, kind, settings):
    dalle = make_dalle(**settings)
    groups = make_optimizer(dalle, OptimConfig(kind=kind)).param_groups
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in trainable(dalle).values()}


@pytest.mark.parametrize("settings", SETTINGS)
def test_muon_has_the_matrices_inside_the_transformer(make_dalle, settings):
    dalle = make_dalle(**settings)
    muon, *adamw = make_optimizer(dalle, OptimConfig(kind="muon", weight_decay=0.3)).param_groups
    expected = {
        f"transformer.blocks.{i}.{layer}.weight"
        for i in range(3)
        for layer in ("attention.to_qkv", "attention.to_out", "feed_forward.to_hidden", "feed_forward.to_out")
    }
    assert names(dalle, muon["params"]) == expected & trainable(dalle).keys()  # shared ones go by their first name
    assert (muon["lr"], muon["momentum"]) == (0.02, 0.95)
    assert (muon["weight_decay"], adamw[-1]["weight_decay"]) == (0.3, 0.0)


def test_muon_takes_both_towers_and_nothing_of_a_vae(tiny_clip, tiny_vae):
    assert {name.split(".")[0] for name in names(tiny_clip, inner_matrices(tiny_clip))} == {
        "text_transformer", "image_transformer",
    }  # fmt: skip
    optimizer = make_optimizer(tiny_vae, OptimConfig(kind="muon"))
    assert type(optimizer) is torch.optim.AdamW
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(tiny_vae.parameters()))


@EVERY_KIND
def test_a_step_moves_every_parameter(make_dalle, kind):
    dalle = make_dalle().train()
    before = copy.deepcopy(trainable(dalle))
    optimizer = make_optimizer(dalle, OptimConfig(kind=kind))
    train(dalle, optimizer, 2)
    assert not [name for name, p in trainable(dalle).items() if torch.equal(p, before[name])]


def test_muon_s_part_is_torch_s_muon_and_the_rest_adamw(make_dalle, monkeypatch):
    """One step of the two in one is a step of each."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    config, dalle = OptimConfig(kind="muon", weight_decay=0.1), make_dalle().train()
    other = copy.deepcopy(dalle)
    train(dalle, make_optimizer(dalle, config), 1)
    matrices = inner_matrices(other)
    rest = [p for p in trainable(other).values() if not any(p is matrix for matrix in matrices)]
    other.loss(TEXT, IMAGE).loss.backward()
    torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1).step()
    decayed = [p for p in rest if any(p is q for q in decay_groups(other)[0])]
    assert decayed
    groups = [{"params": decayed}, {"params": [p for p in rest if not any(p is q for q in decayed)], "weight_decay": 0}]
    torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.1, fused=True).step()
    for name, p in trainable(dalle).items():
        assert torch.equal(p, trainable(other)[name]), name


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_muon_in_fp32_is_torch_s_muon_but_for_its_rounding(shape):
    generator = torch.Generator().manual_seed(0)
    start, settings = torch.randn(shape, generator=generator), {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9}
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [(ours, PreciseMuon([ours], **settings)), (theirs, torch.optim.Muon([theirs], **settings))]
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        for weights, optimizer in optimizers:
            weights.grad = gradient.clone()
            optimizer.step()
    assert (ours - start).abs().mean() > 0.05
    torch.testing.assert_close(ours, theirs, atol=0.01, rtol=0)
    assert torch.equal(
        optimizers[0][1].state[ours]["momentum_buffer"], optimizers[1][1].state[theirs]["momentum_buffer"]
    )


def test_the_iteration_keeps_singular_vectors_and_brings_singular_values_near_one():
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonal(1000 * matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7) @ right.T
    values = inside.diagonal()
    assert 0.5 < values.min() <= values.max() < 1.5
    torch.testing.assert_close(inside, values.diag(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("supported", [False, True])
def test_muon_is_torch_s_where_the_cpu_knows_bf16(make_dalle, monkeypatch, supported):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    optimizer = make_optimizer(make_dalle(), OptimConfig(kind="muon"))
    assert isinstance(optimizer, MuonAdamW)
    assert type(optimizer.muon) is (torch.optim.Muon if supported else PreciseMuon)


@EVERY_KIND
def test_a_restored_optimizer_goes_on_bit_for_bit(make_dalle, kind, tmp_path):
    config = OptimConfig(kind=kind, lr=3e-3, weight_decay=0.1, warmup_steps=2)

    def start(dalle):
        optimizer = make_optimizer(dalle, config)
        return optimizer, make_scheduler(optimizer, config, 10)

    def go_on(dalle, optimizer, scheduler):
        for _ in range(3):
            train(dalle, optimizer, 1)
            scheduler.step()

    dalle = make_dalle(dim=64).train()  # large enough for states of 8 bits
    optimizer, scheduler = start(dalle)
    go_on(dalle, optimizer, scheduler)
    resumed = copy.deepcopy(dalle)
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state")
    states = torch.load(tmp_path / "state", weights_only=True)
    parts = start(resumed)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    go_on(dalle, optimizer, scheduler)
    go_on(resumed, *parts)
    for name, p in trainable(dalle).items():
        assert torch.equal(p, trainable(resumed)[name]), name


@EVERY_KIND
def test_all_rates_follow_the_schedule(make_dalle, kind):
    config = OptimConfig(kind=kind, lr=1e-3, muon_lr=0.5, warmup_steps=4, schedule="paper", halvings=1)
    optimizer = make_optimizer(make_dalle(), config)
    scheduler = make_scheduler(optimizer, config, 8)
    highest = {0.5, 1e-3} if isinstance(optimizer, MuonAdamW) else {1e-3}
    for factor in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.5):
        assert {group["lr"] for group in optimizer.param_groups} == {factor * lr for lr in highest}
        optimizer.step()
        scheduler.step()


@EVERY_KIND
def test_the_loss_falls(make_dalle, kind):
    dalle = make_dalle(dim=64, depth=2).train()
    losses = train(dalle, make_optimizer(dalle, OptimConfig(kind=kind, lr=3e-3, betas=[0.9, 0.96])), 60)
    assert losses[-1] < 0.5 * losses[0]


def test_the_closure_runs_once_with_gradients(make_dalle):
    """As Lightning's automatic optimisation calls it."""
    dalle, calls = make_dalle().train(), []
    optimizer = make_optimizer(dalle, OptimConfig(kind="muon"))

    def closure():
        calls.append(dalle.loss(TEXT, IMAGE).loss)
        calls[0].backward()
        return calls[0]

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1


def test_a_missing_package_is_named(make_dalle, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        make_optimizer(make_dalle(), OptimConfig(kind="adamw8bit"))


def test_an_unknown_kind_is_told_the_known_ones():
    with pytest.raises(ValueError, match=", ".join(KINDS) + ", got 'lion'"):
        OptimConfig(kind="lion")


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"muon_lr": 0.0},
        {"muon_momentum": 1.0},
        {"betas": [0.9]},
        {"schedule": "step"},
        {"halvings": -1},
        {"clip": -1.0},
        {"lr_min_ratio": 2.0},
        {"decay_share": 0.0},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimConfig(**wrong)
