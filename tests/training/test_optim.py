import pytest
import torch
from torch import nn

from dalle_pytorch.training.callbacks import ema
from dalle_pytorch.training.optim import OptimConfig, decay_groups, make_optimizer


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


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"betas": [0.9]}, {"schedule": "step"}, {"clip": -1.0}, {"lr_min_ratio": 2.0}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimConfig(**wrong)
