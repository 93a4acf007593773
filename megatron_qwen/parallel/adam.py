"""Adam with the state layout of Transformer Engine's and Apex's FusedAdam, in plain torch.

Megatron-Core's DistributedOptimizer saves with torch.optim.AdamW but cannot load such a state into
a fresh process: it looks for the step in the parameter group, where the fused optimizers keep it
(distrib_optimizer.py, `load_state_dict` and `_set_main_param_and_optimizer_states`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron_qwen.errors import ConfigError


class FusedLayoutAdam(torch.optim.Optimizer):
    """Adam or AdamW; `step` lives in the group, `exp_avg` and `exp_avg_sq` in each parameter's state.

    Args:
        params: parameters or parameter groups, fp32.
        lr: learning rate.
        weight_decay: decoupled (`adam_w_mode`) or added to the gradient.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
        adam_w_mode: decoupled weight decay (Loshchilov and Hutter, arXiv:1711.05101).
        bias_correction: divide the moments by 1 - beta^step (Kingma and Ba, arXiv:1412.6980).
        capturable: step inside a CUDA graph; not supported.
        precision_aware: arguments of Megatron's precision-aware optimizer; not supported.

    Attributes:
        gradient_divisor: the next step divides every gradient by this first (and in `p.grad` too), in the same pass
            over memory; then it is 1 again, also if the step raised. Not part of the state.

    Raises:
        ConfigError: an argument that is not supported.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        capturable: bool = False,
        **precision_aware: Any,
    ) -> None:
        if capturable or precision_aware:
            asked = ", ".join(sorted(precision_aware) + ["capturable"] * capturable)
            raise ConfigError(
                f"optimizer: {asked}: only Transformer Engine's FusedAdam can do that, and it is not installed"
            )
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "bias_correction": bias_correction},
        )
        self.adam_w_mode = adam_w_mode
        self.gradient_divisor = 1.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        try:
            for group in self.param_groups:
                group["step"] = int(group.get("step", 0)) + 1
                self._update(group, [p for p in group["params"] if p.grad is not None])
        finally:
            self.gradient_divisor = 1.0
        return loss

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        if not params:
            return
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        # One pass over memory; the same update from torch._foreach_* takes 3.5 times as long on a CPU.
        fused = torch._fused_adamw_ if self.adam_w_mode else torch._fused_adam_
        # The kernel divides the moments by 1 - beta^step, which is 1 at an infinite step.
        step = float(group["step"]) if group["bias_correction"] else math.inf
        beta1, beta2 = group["betas"]
        divisor = self.gradient_divisor
        fused(
            params,
            [p.grad for p in params if p.grad is not None],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [torch.tensor(step, device=p.device) for p in params],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None if divisor == 1.0 else torch.tensor(divisor, dtype=torch.float32, device=params[0].device),
        )
