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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            self._update(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        if not params:
            return
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads = [p.grad for p in params]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        beta1, beta2 = group["betas"]
        correct1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
        correct2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
        if self.adam_w_mode:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        else:
            grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, math.sqrt(correct2))
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -group["lr"] / correct1)
