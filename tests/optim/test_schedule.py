"""Learning rates: Megatron's, position for position, and NEO's wsd by hand."""

from __future__ import annotations

import math

import pytest

from megatron.pretrain.errors import UserError
from megatron.pretrain.optim.schedule import LrSchedule

NEO = dict(max_lr=2e-4, min_lr=2e-5, warmup_samples=30, decay_samples=200)
DECAY = dict(style="wsd", max_lr=2e-4, min_lr=2e-5, warmup_samples=0, wsd_decay_ratio=0.1)


def _megatron(style: str, *, max_lr, min_lr, warmup_samples, decay_samples, warmup_init_lr):
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class Optimizer:
        param_groups = [{}]

    return OptimizerParamScheduler(
        Optimizer(), warmup_init_lr, max_lr, min_lr, warmup_samples, decay_samples, style,
        start_wd=0.1, end_wd=0.1, wd_incr_steps=decay_samples, wd_incr_style="constant")


@pytest.mark.parametrize("style", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_samples", [0, 1, 30, 199])
@pytest.mark.parametrize("warmup_init_lr", [0.0, 1e-5])
def test_every_position_is_megatrons(style, warmup_samples, warmup_init_lr):
    settings = {**NEO, "warmup_samples": warmup_samples, "warmup_init_lr": warmup_init_lr}
    schedule, reference = LrSchedule(style=style, **settings), _megatron(style, **settings)
    for consumed in range(250):
        expected = reference.optimizer.param_groups[0]["lr"]
        assert schedule(consumed) == pytest.approx(expected, rel=1e-15, abs=0)
        reference.step(1)


def test_phase_two_decays_from_its_first_step():
    """NEO's decay phase: stable 0, half-life 0.5 * 1000 + 1."""
    schedule = LrSchedule(**DECAY, decay_samples=1000, wsd_half_life_samples=-1, stable_samples=0)
    assert schedule.half_life_samples == 501
    assert schedule(0) == 2e-4
    assert schedule(1) == pytest.approx(2e-4 * 0.5 ** (1 / 501), rel=1e-15)
    assert schedule(501) == pytest.approx(1e-4, rel=1e-15)
    assert schedule(1000) == pytest.approx(2e-4 * 0.5 ** (1000 / 501), rel=1e-15)
    assert schedule(1001) == 2e-5


def test_wsd_warms_up_stays_decays_and_ends():
    schedule = LrSchedule(
        style="wsd", max_lr=1.0, min_lr=0.1, warmup_samples=10, decay_samples=125, wsd_decay_ratio=0.25)
    assert schedule.wsd_stable_samples == 100
    assert schedule.half_life_samples == 13.5
    assert [schedule(n) for n in (0, 5, 10, 11, 100)] == [0.0, 0.5, 1.0, 1.0, 1.0]
    assert schedule(101) == pytest.approx(0.5 ** (1 / 13.5))
    assert schedule(125) == pytest.approx(0.5 ** (25 / 13.5))
    assert schedule(126) == 0.1


def test_wsd_never_goes_below_the_lowest_rate():
    schedule = LrSchedule(**DECAY, decay_samples=1000, wsd_half_life_samples=10, stable_samples=0)
    assert schedule(33) > 2e-5
    assert schedule(34) == 2e-5


def test_wsd_without_decay_stays_at_the_highest_rate():
    schedule = LrSchedule(**DECAY, decay_samples=1000, stable_samples=-2)
    assert {schedule(n) for n in (0, 1, 999, 1000)} == {2e-4}
    assert schedule(1001) == 2e-5


def test_a_long_half_life_is_refused_only_where_something_decays():
    LrSchedule(**DECAY, decay_samples=100, stable_samples=-2, wsd_half_life_samples=500)
    LrSchedule(**DECAY, decay_samples=100, stable_samples=0, wsd_half_life_samples=99)
    with pytest.raises(UserError, match="--wsd_half_life 100: .* below the 100 samples of the decay"):
        LrSchedule(**DECAY, decay_samples=100, stable_samples=0, wsd_half_life_samples=100)


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"style": "cosin"}, "--lr-decay-style cosin: must be one of cosine, linear, constant, wsd"),
    ({"min_lr": 1.0}, "--min-lr 1.0 must lie between 0 and --lr 0.0002"),
    ({"min_lr": -1e-9}, "--min-lr -1e-09 must lie"),
    ({"max_lr": math.nan}, "--lr nan"),
    ({"warmup_init_lr": 1.0}, "--lr-warmup-init 1.0 must lie between 0 and --lr 0.0002"),
    ({"warmup_samples": 100}, "--lr-warmup-iters: 100 samples .* below the 100 samples"),
    ({"warmup_samples": -1}, "--lr-warmup-iters: -1 samples"),
    ({"wsd_decay_ratio": 0.0}, "--wsd_decay_ratio 0.0: must be above 0 and at most 1"),
    ({"wsd_decay_ratio": 1.1}, "--wsd_decay_ratio 1.1: must be above 0 and at most 1"),
    ({"stable_samples": 101}, "--lr_stable_steps 101: must be from 0 to the 100 samples"),
    ({"stable_samples": -3}, "--lr_stable_steps -3: must be"),
    ({"wsd_half_life_samples": 0}, "--wsd_half_life 0: a half-life of 0 samples must be above 0"),
    ({"wsd_half_life_samples": -2}, "--wsd_half_life -2: a half-life of -2 samples must be above 0"),
])
def test_settings_that_define_no_schedule_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        LrSchedule(**{**DECAY, "decay_samples": 100, **changes})
