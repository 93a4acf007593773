"""RMSNorm, alone and with the residual's addition.

Shapes: T tokens, H hidden; x, residual and their gradients [T, H], weight [H].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import Function, OpCase, Sizes, Workload, random_normal
from megatron_qwen.model.config import QwenConfig

EPS = 1e-6


def _sizes(config: QwenConfig, length: int) -> dict[str, int]:
    return {"tokens": length, "hidden": config.hidden_size}


def _workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    shape = (sizes["tokens"], sizes["hidden"])
    weight = 1.0 + 0.2 * random_normal(shape[1:], torch.float32, device, seed + 2)
    return Workload(
        leaves={"x": random_normal(shape, dtype, device, seed, 3.0), "weight": weight.to(dtype)},
        others={},
        grads=(random_normal(shape, dtype, device, seed + 1),),
        shared=frozenset({"weight"}),
    )


def _add_workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    alone = _workload(sizes, dtype, device, seed)
    shape = (sizes["tokens"], sizes["hidden"])
    return Workload(
        leaves={"residual": random_normal(shape, dtype, device, seed + 3, 3.0), **alone.leaves},
        others={},
        grads=(*alone.grads, random_normal(shape, dtype, device, seed + 4)),
        shared=alone.shared,
    )


def _ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x, weight, eps=EPS)


def _add_ours(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.add_rms_norm(x, residual, weight, eps=EPS)


def _plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _add_plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _plain(total, weight), total


def _aten() -> Function:
    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, EPS)

    return run


def _liger() -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def run(x: torch.Tensor, weight: torch.Tensor) -> Any:
        # In place it would overwrite the incoming gradient, which another contestant still needs.
        return LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False, None)

    return run


def _add_liger() -> Function:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def run(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)

    return run


def _transformer_engine() -> Function:
    import transformer_engine.pytorch as te

    modules: dict[int, Any] = {}

    def run(x: torch.Tensor, weight: torch.Tensor) -> Any:
        hidden = weight.shape[0]
        if hidden not in modules:
            modules[hidden] = te.RMSNorm(hidden, eps=EPS, dtype=x.dtype, device=x.device)
        return torch.func.functional_call(modules[hidden], {"weight": weight}, (x,))

    return run


def _bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Forward: x, y; backward: x, dy, dx. The weight and its gradient are H each."""
    rows, weight = sizes["tokens"] * sizes["hidden"], sizes["hidden"]
    return element * {"forward": 2 * rows + weight, "backward": 3 * rows + 2 * weight}[direction]


def _add_bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Forward: x, residual, y, s; backward: s, dy, ds, and one dx for both addends."""
    rows, weight = sizes["tokens"] * sizes["hidden"], sizes["hidden"]
    return element * {"forward": 4 * rows + weight, "backward": 4 * rows + 2 * weight}[direction]


def _flops(sizes: Sizes, direction: str) -> int:
    """Forward: square, add, times r, times w. Backward, with n = x r: n, g w, their dot product (2), dx (3), dw (2)."""
    return sizes["tokens"] * sizes["hidden"] * {"forward": 4, "backward": 9}[direction]


def _add_flops(sizes: Sizes, direction: str) -> int:
    """One addition more, in either direction."""
    return _flops(sizes, direction) + sizes["tokens"] * sizes["hidden"]


_ODD = ({"tokens": 1, "hidden": 3}, {"tokens": 7, "hidden": 127}, {"tokens": 67, "hidden": 896},
        {"tokens": 33, "hidden": 3585}, {"tokens": 5, "hidden": 8192})  # fmt: skip

CASES = (
    OpCase(
        name="rms_norm",
        family="norm",
        operation="rms_norm",
        about="x / rms(x) * weight",
        outputs=("y",),
        sizes=_sizes,
        workload=_workload,
        ours=_ours,
        plain=_plain,
        peers={"aten": _aten, "liger": _liger, "te": _transformer_engine},
        bytes_moved=_bytes,
        flops=_flops,
        odd_sizes=_ODD,
    ),
    OpCase(
        name="add_rms_norm",
        family="norm",
        operation="rms_norm",
        about="s = x + residual, and s / rms(s) * weight",
        outputs=("y", "sum"),
        sizes=_sizes,
        workload=_add_workload,
        ours=_add_ours,
        plain=_add_plain,
        peers={"liger": _add_liger},
        bytes_moved=_add_bytes,
        flops=_add_flops,
        odd_sizes=_ODD,
    ),
)
