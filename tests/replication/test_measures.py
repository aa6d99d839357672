"""What arms measure, in closed form or against a simulation."""

import pytest
import torch

from dalle_pytorch import DiscreteVAE, DiscreteVAEConfig
from dalle_pytorch.evaluation.retrieval import best_of_n
from replication import drawn
from replication.dalles import typos
from replication.image_tokenizers import gap, laplace_tail, outside
from replication.pictures import read


def make_vae(likelihood):
    return DiscreteVAE(
        DiscreteVAEConfig(
            image_size=16, num_layers=2, codebook_size=12, codebook_dim=8, hidden_dim=8, likelihood=likelihood
        )
    ).eval()


def test_the_tail_of_a_laplace_is_what_samples_show():
    samples = torch.distributions.Laplace(0.0, 0.3).sample((400_000,))
    for distance in (-0.5, 0.0, 0.2, 1.0):
        found = laplace_tail(torch.tensor(distance).view(1, 1, 1, 1), torch.tensor(0.3)).item()
        assert found == pytest.approx((samples < -distance).float().mean().item(), abs=0.003)


@pytest.mark.parametrize(
    ("likelihood", "family"), [("mse", torch.distributions.Normal), ("smooth_l1", torch.distributions.Laplace)]
)
def test_probability_outside_pictures_is_that_of_the_fitted_density(likelihood, family):
    vae, images = make_vae(likelihood), torch.rand(6, 3, 16, 16)
    output = vae.relaxed(images, 1e-4, torch.Generator().manual_seed(0))[1].detach()
    error = output - (images - 0.5) / 0.5
    scale = error.square().mean().sqrt() if likelihood == "mse" else error.abs().mean()
    density = family(output, scale)
    expected = 1 - (density.cdf(torch.tensor(1.0)) - density.cdf(torch.tensor(-1.0)))
    assert outside(vae, images)["outside"] == pytest.approx(100 * expected.mean().item(), abs=1e-3)


def test_a_density_over_pictures_alone_has_nothing_outside():
    assert outside(make_vae("logit_laplace"), torch.rand(2, 3, 16, 16)) == {"outside": 0.0}


def test_the_gap_closes_with_the_temperature():
    vae, images = make_vae("mse"), torch.rand(8, 3, 16, 16)
    wide, narrow, none = (gap(vae, images, tau) for tau in (1.0, 0.1, 1e-4))
    assert wide["sampled"] == narrow["sampled"]
    assert abs(wide["gap"]) > abs(narrow["gap"]) > abs(none["gap"])
    assert none["gap"] == pytest.approx(0, abs=1e-6)
    assert wide["gap"] == pytest.approx(wide["sampled"] - wide["relaxed"])


def test_the_best_of_each_group_is_taken():
    ranks = torch.tensor([[0.1, 0.9, 0.5, 0.4], [0.8, 0.2, 0.3, 0.6]])
    features = torch.arange(8.0).view(2, 4, 1)
    assert drawn.best(features, ranks, 2).flatten().tolist() == [1, 2, 4, 7]
    assert drawn.best(features, ranks, 4).flatten().tolist() == [1, 4]
    assert drawn.best(features, ranks, 1).flatten().tolist() == list(range(8))


def test_the_best_of_groups_is_on_average_best_of_n():
    """Over many prompts, what is chosen from groups scores as the closed form says."""
    ranks = torch.rand(4000, 8)
    values = ranks + 0.5 * torch.randn(4000, 8)
    chosen = drawn.best(values[..., None], ranks, 4).mean().item()
    assert chosen == pytest.approx(best_of_n(ranks, values, [4]).mean().item(), abs=0.02)


def test_gains_split_at_the_knee():
    numbers = {"clip_score_best_of_1": 10.0, "clip_score_best_of_32": 14.0, "clip_score_best_of_256": 15.0}
    assert drawn.gains(numbers, [1, 32, 256]) == {"first_gain": 4.0, "later_gain": 1.0}
    assert drawn.gains(numbers, [1, 32]) == {}


def test_typos_keep_short_words_and_all_letters():
    assert typos("a red banana, noto") == "a red bnaana, ntoo"
    assert sorted(typos("grinning face")) == sorted("grinning face")


def test_pictures_are_drawn_by_the_seed_and_resized():
    some = read("data/emoji", "val", 32, most=5, seed=1)
    assert some.images.shape == (5, 3, 32, 32)
    again, other = read("data/emoji", "val", 32, most=5, seed=1), read("data/emoji", "val", 32, most=5, seed=2)
    assert again.captions == some.captions != other.captions
    assert len(read("data/emoji", "val", 32).captions) == 185
