"""The learning-rate schedule: Megatron-Core's OptimizerParamScheduler, counted in steps.

The rate of step k (from 1) is a function of k alone: linear warm-up to `lr` at step `warmup`, then the
chosen decay, `min_lr` from step `decay` on. Megatron-LM counts from 0, so that its first step has rate 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_qwen.training.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

_MEGATRON_STYLE = {"constant": "constant", "linear": "linear", "cosine": "cosine", "wsd": "WSD"}


def build_scheduler(recipe: Recipe, optimizer: Any) -> OptimizerParamScheduler:
    """Return the scheduler of `optimizer` (anything with param_groups), standing before step 1."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    schedule, adam = recipe.schedule, recipe.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=adam.lr,
        min_lr=adam.final_lr,
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.decay,
        lr_decay_style=_MEGATRON_STYLE[schedule.style],
        start_wd=adam.weight_decay,
        end_wd=adam.weight_decay,
        wd_incr_steps=schedule.decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=schedule.wsd_decay,
        lr_wsd_decay_style=schedule.wsd_decay_style,
    )


def set_step(scheduler: OptimizerParamScheduler, step: int) -> float:
    """Give every parameter group the rate of step `step` (from 1) and return the peak group's rate."""
    scheduler.num_steps = 0
    scheduler.step(step)
    return float(scheduler.get_lr({"max_lr": scheduler.max_lr, "min_lr": scheduler.min_lr}))
