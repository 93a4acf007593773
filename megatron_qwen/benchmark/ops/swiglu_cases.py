"""SwiGLU on the packed output of a gate-and-up projection.

Shapes: T tokens, F the MLP's width; packed [T, 2F], gate first; y [T, F].
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.benchmark.ops.case import Function, OpCase, Sizes, Workload, random_normal
from megatron_qwen.model.config import QwenConfig


def _sizes(config: QwenConfig, length: int) -> dict[str, int]:
    return {"tokens": length, "ffn": config.intermediate_size}


def _workload(sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Workload:
    tokens, ffn = sizes["tokens"], sizes["ffn"]
    return Workload(
        leaves={"packed": random_normal((tokens, 2 * ffn), dtype, device, seed, 3.0)},
        others={},
        grads=(random_normal((tokens, ffn), dtype, device, seed + 1),),
        shared=frozenset(),
    )


def _ours(packed: torch.Tensor) -> torch.Tensor:
    return ops.swiglu(packed)


def _plain(packed: torch.Tensor) -> torch.Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _liger() -> Function:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    def run(packed: torch.Tensor) -> Any:
        return LigerFusedGateUpSiLUMulFunction.apply(packed, False)

    return run


def _bytes(sizes: Sizes, direction: str, element: int) -> int:
    """Forward: gate, up, y; backward: gate, up, dy, d gate, d up."""
    return element * sizes["tokens"] * sizes["ffn"] * {"forward": 3, "backward": 5}[direction]


def _flops(sizes: Sizes, direction: str) -> int:
    """Per y, an exponential as one. Forward: sigmoid (3), times gate, times up.

    Backward: sigmoid (3), silu (1), d up (1), and d gate = dy up s (1 + gate (1 - s)) (6).
    """
    return sizes["tokens"] * sizes["ffn"] * {"forward": 5, "backward": 11}[direction]


CASES = (
    OpCase(
        name="swiglu",
        family="swiglu",
        operation="swiglu",
        about="silu(gate) * up of packed [gate, up]",
        outputs=("y",),
        sizes=_sizes,
        workload=_workload,
        ours=_ours,
        plain=_plain,
        peers={"liger": _liger},
        bytes_moved=_bytes,
        flops=_flops,
        odd_sizes=(
            {"tokens": 1, "ffn": 1},
            {"tokens": 7, "ffn": 1023},
            {"tokens": 67, "ffn": 4864},
            {"tokens": 5, "ffn": 18_945},
        ),
    ),
)
