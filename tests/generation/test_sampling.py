"""Sampling functions: exact truncation, the right distribution, no shared randomness."""

import pytest
import torch

from dalle_pytorch.generation.sampling import (
    SamplingConfig,
    candidate_uniforms,
    guide,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)

LOGITS = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0, -1.0], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]])


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_top_k_keeps_exactly_k_of_the_highest(k):
    kept = keep_top_k(LOGITS, k)
    assert (kept.isfinite().sum(dim=1) == k).all()
    dropped = LOGITS.masked_fill(kept.isfinite(), -torch.inf).amax(dim=1)
    assert (kept.masked_fill(~kept.isfinite(), torch.inf).amin(dim=1) >= dropped).all()
    assert torch.equal(keep_top_k(LOGITS, 0), LOGITS)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.6, 0.95, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(p):
    probabilities = LOGITS.softmax(-1)
    kept = keep_top_p(LOGITS, p).isfinite()
    share = (probabilities * kept).sum(dim=1)
    assert (share >= p - 1e-6).all()
    smallest_kept = probabilities.masked_fill(~kept, 2).amin(dim=1)
    assert (share - smallest_kept < p).all()


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_likely_enough(p):
    probabilities = LOGITS.softmax(-1)
    kept = keep_min_p(LOGITS, p).isfinite()
    assert torch.equal(kept, probabilities >= p * probabilities.amax(dim=1, keepdim=True) * (1 - 1e-6))
    assert kept.any(dim=1).all()


def test_a_schedule_is_straight_between_its_points():
    assert SamplingConfig(cfg_scale=2.0).scales(3) == [2.0, 2.0, 2.0]
    assert SamplingConfig(cfg_schedule=[1.0, 4.0]).scales(4) == [1.0, 2.0, 3.0, 4.0]
    assert SamplingConfig(cfg_schedule=[1.0, 3.0, 1.0]).scales(5) == [1.0, 2.0, 3.0, 2.0, 1.0]
    assert SamplingConfig(cfg_schedule=[2.0, 5.0]).scales(1) == [2.0]
    assert SamplingConfig(cfg_schedule=[1.0, 1.5]).guided()
    assert not SamplingConfig(cfg_schedule=[1.0, 1.0]).guided()


def test_guidance_grows_by_a_power_cosine_inside_its_interval():
    scales = SamplingConfig(cfg_scale=5.0, cfg_power=1.0).scales(5)
    assert scales == pytest.approx([1.0, 1 + 2 - 2 * 0.5**0.5, 3.0, 3 + 2 * 0.5**0.5, 5.0])
    slower = SamplingConfig(cfg_scale=5.0, cfg_power=2.75).scales(5)
    assert all(late < early for late, early in zip(slower[1:4], scales[1:4], strict=True))
    assert slower[4] == pytest.approx(5.0)
    assert SamplingConfig(cfg_scale=2.0, cfg_interval=[0.25, 0.75]).scales(8) == [1, 1, 2, 2, 2, 2, 1, 1]
    for settings, message in (
        ({"cfg_power": 0.0}, "cfg_power must be positive"),
        ({"cfg_power": 1.0, "cfg_schedule": [1.0, 2.0]}, "both set"),
        ({"cfg_interval": [0.5]}, "two rising shares"),
        ({"cfg_interval": [0.5, 0.2]}, "two rising shares"),
        ({"cfg_interval": [0.5, 1.2]}, "two rising shares"),
        ({"draft_tokens": 1}, "draft_tokens must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**settings)


def test_draws_follow_the_softmax():
    count = 20_000
    uniforms = (torch.arange(count) + 0.5) / count
    tokens = SamplingConfig(temperature=0.7).pick(LOGITS[:1].expand(count, -1), uniforms)
    shares = torch.bincount(tokens, minlength=6) / count
    torch.testing.assert_close(shares, (LOGITS[0] / 0.7).softmax(-1), atol=2 / count, rtol=0)


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.5}])
def test_truncated_tokens_are_never_drawn(settings):
    edges = torch.tensor([0.0, 0.5, 1 - 2**-24])  # the ends of what torch.rand gives
    tokens = SamplingConfig(**settings).pick(LOGITS[:1].expand(3, -1), edges)
    keep = {"top_k": keep_top_k, "top_p": keep_top_p, "min_p": keep_min_p}
    ((name, value),) = settings.items()
    kept = keep[name](LOGITS[:1], value)
    assert kept.isfinite()[0][tokens].all()


def test_rows_do_not_depend_on_each_other_and_zero_is_greedy():
    uniforms = torch.tensor([0.3, 0.9])
    together = SamplingConfig(top_k=4).pick(LOGITS, uniforms)
    apart = [SamplingConfig(top_k=4).pick(LOGITS[i : i + 1], uniforms[i : i + 1]) for i in range(2)]
    assert torch.equal(together, torch.cat(apart))
    assert torch.equal(SamplingConfig(temperature=0.0).pick(LOGITS[1:], torch.tensor([0.99])), torch.tensor([0]))


def test_guidance_is_linear_and_one_is_off():
    cond, uncond = LOGITS[:1], LOGITS[1:]
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(guide(cond, uncond, 3.0), uncond + 3 * (cond - uncond))


def test_uniforms_are_a_function_of_prompt_seed_and_index():
    state = torch.get_rng_state()
    same = candidate_uniforms("a", 0, 0, 9)
    assert torch.equal(same, candidate_uniforms("a", 0, 0, 9))
    assert torch.equal(torch.get_rng_state(), state)
    for other in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1)):
        assert not torch.equal(same, candidate_uniforms(*other, 9))


def test_settings_out_of_range_are_named():
    for settings, message in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingConfig(**settings)
    with pytest.raises(ValueError, match=r"cfg_scale=2\.0 and cfg_schedule"):
        SamplingConfig(cfg_scale=2.0, cfg_schedule=[1.0, 2.0])
    with pytest.raises(ValueError, match="empty list"):
        SamplingConfig(cfg_schedule=[])
