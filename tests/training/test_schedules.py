import math

import pytest

from dalle_pytorch.training.schedules import SHAPES, ScheduleConfig, lr_factor, ramp, scheduled


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ramp_goes_from_0_to_1_and_never_back(shape):
    values = [ramp(shape, i / 50) for i in range(51)]
    assert values[0] == pytest.approx(0)
    assert values[-1] == pytest.approx(0 if shape == "constant" else 1)
    assert values == sorted(values)
    assert (ramp(shape, -1.0), ramp(shape, 2.0)) == (values[0], values[-1])


def test_ramps_have_their_closed_forms():
    assert ramp("half_cosine", 0.5) == pytest.approx(0.5)
    assert ramp("quarter_cosine", 0.5) == pytest.approx(1 - math.cos(math.pi / 4))
    assert ramp("linear", 0.25) == 0.25


def test_a_schedule_ends_after_its_share_and_stays():
    config = ScheduleConfig(start=1.0, end=0.0625, share=0.05)
    assert scheduled(config, 0, 1000) == 1
    assert scheduled(config, 25, 1000) == pytest.approx((1 + 0.0625) / 2)
    assert scheduled(config, 50, 1000) == scheduled(config, 999, 1000) == pytest.approx(0.0625)


def test_the_learning_rate_warms_up_then_falls_to_its_floor():
    def factor(step, schedule="cosine"):
        return lr_factor(step, total_steps=110, warmup_steps=10, schedule=schedule, min_ratio=0.1)

    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert factor(10) == 1
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)
    assert factor(60, "constant") == 1


def test_the_paper_s_learning_rate_is_halved_at_even_distances():
    def factor(step, **more):
        return lr_factor(step, total_steps=70, warmup_steps=10, schedule="paper", min_ratio=0.1, **more)

    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [factor(step) for step in range(10, 70)] == [2.0**-i for i in range(6) for _ in range(10)]
    assert factor(70) == factor(1000) == 1 / 32  # the paper ends 32 times lower
    assert {factor(step, halvings=0) for step in range(10, 71)} == {1.0}


def test_wsd_stays_and_goes_down_at_the_end():
    def factor(step, total=100, **more):
        return lr_factor(step, total_steps=total, warmup_steps=10, schedule="wsd", min_ratio=0.1, **more)

    assert [factor(step) for step in (0, 9, 10, 50, 80)] == pytest.approx([0.1, 1, 1, 1, 1])
    assert [factor(step) for step in (90, 100, 200)] == pytest.approx([0.55, 0.1, 0.1])
    assert [factor(step, decay_share=1.0) for step in (10, 50)] == pytest.approx([0.91, 0.55])
    assert [factor(step, total=200) for step in range(80)] == [factor(step) for step in range(80)]  # lengthened


@pytest.mark.parametrize("wrong", [{"shape": "sine"}, {"share": 0.0}, {"share": 1.5}])
def test_wrong_schedules_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScheduleConfig(**wrong)
