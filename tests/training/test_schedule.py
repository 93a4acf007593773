"""The rate of step k is what the formulas of the styles say."""

from __future__ import annotations

import math

import pytest

from megatron_qwen.training.overrides import apply_overrides
from megatron_qwen.training.recipe import Recipe
from megatron_qwen.training.schedule import build_scheduler, set_step


class Groups:
    """As much of an optimizer as a schedule touches."""

    def __init__(self) -> None:
        self.param_groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]


def rates(*assignments: str) -> list[float]:
    recipe = apply_overrides(
        Recipe(),
        ["optimizer.lr=1.0", "optimizer.min_lr=0.1", "schedule.steps=20", "schedule.warmup_steps=4", *assignments],
    )
    groups = Groups()
    scheduler = build_scheduler(recipe, groups)
    found = []
    for step in range(1, recipe.schedule.steps + 1):
        found.append(set_step(scheduler, step))
        assert [group["lr"] for group in groups.param_groups] == [found[-1]] * 2
        assert [group["weight_decay"] for group in groups.param_groups] == [recipe.optimizer.weight_decay, 0.0]
    return found


EXPECTED = {
    "constant": lambda k: 1.0,
    "linear": lambda k: 0.1 + 0.9 * (1 - (k - 4) / 16),
    "cosine": lambda k: 0.1 + 0.9 * 0.5 * (math.cos(math.pi * (k - 4) / 16) + 1),
    "wsd": lambda k: 1.0 if k <= 15 else 0.1 + 0.9 * (1 - (k - 15) / 5),
}


@pytest.mark.parametrize("style", EXPECTED)
def test_rates_follow_the_formula(style):
    found = rates(f"schedule.style={style}", "schedule.wsd_decay_steps=5")
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4:] == pytest.approx([EXPECTED[style](k) for k in range(5, 21)])


def test_the_rate_stays_at_its_minimum_after_the_decay():
    assert rates("schedule.decay_steps=10")[9:] == pytest.approx([0.1] * 11)


def test_without_warm_up_the_first_step_has_nearly_the_peak_rate():
    assert rates("schedule.warmup_steps=0", "schedule.style=linear")[0] == pytest.approx(0.1 + 0.9 * 19 / 20)
