"""Compiles the launches below as they would be on a device and prints what came out, as JSON.

Usage: aot_launches.py ARCHITECTURE [LABEL ...]. Meta tensors: real sizes, no memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from megatron_qwen.kernels.qkv_rope import kernel as qkv_rope
from megatron_qwen.kernels.rms_norm import kernel as rms_norm
from megatron_qwen.kernels.swiglu import kernel as swiglu
from megatron_qwen.testing.aot import compile_launches

TOKENS = 32768
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Qwen2.5 per tensor-parallel rank: 0.5B, 7B and 72B at TP 8; and an odd one.
MLP_WIDTHS = {"0.5b": 4864, "7b": 18944, "72b-tp8": 3696, "odd": 1001}

HIDDEN = {"0.5b": 896, "7b": 3584, "72b": 8192, "odd": 1001}

# Groups, heads per group with key and value, head size, half of the rotated dimensions.
ATTENTION = {
    "0.5b": qkv_rope.Layout(groups=2, per_group=9, head_dim=64, half=32),
    "7b": qkv_rope.Layout(groups=4, per_group=9, head_dim=128, half=64),
    "72b": qkv_rope.Layout(groups=8, per_group=10, head_dim=128, half=64),
    "72b-tp8": qkv_rope.Layout(groups=1, per_group=10, head_dim=128, half=64),
    "odd": qkv_rope.Layout(groups=3, per_group=4, head_dim=50, half=15),
}


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_swiglu(width: int, dtype: torch.dtype) -> None:
    packed, out = meta(TOKENS, 2 * width, dtype=dtype), meta(TOKENS, width, dtype=dtype)
    swiglu.launch_forward(packed, out)
    swiglu.launch_backward(out, packed, packed)


def launch_rms_norm(hidden: int, dtype: torch.dtype, adds: bool) -> None:
    x, weight = meta(TOKENS, hidden, dtype=dtype), meta(hidden, dtype=dtype)
    inverse_rms = meta(TOKENS, dtype=torch.float32)
    other = x if adds else None
    rms_norm.launch_forward(x, other, weight, 1e-6, x, other, inverse_rms)
    rms_norm.launch_backward(x, other, x, weight, inverse_rms, x, weight)


def launch_qkv_rope(layout: qkv_rope.Layout, dtype: torch.dtype, with_positions: bool) -> None:
    width = layout.groups * layout.per_group * layout.head_dim
    packed, bias = meta(TOKENS, width, dtype=dtype), meta(width, dtype=dtype)
    tables = (meta(TOKENS, layout.half, dtype=torch.float32), meta(TOKENS, layout.half, dtype=torch.float32))
    positions = meta(TOKENS, dtype=torch.int32) if with_positions else None
    queries = layout.groups * (layout.per_group - 2)
    heads = tuple(
        meta(TOKENS, 1, each, layout.head_dim, dtype=dtype) for each in (queries, layout.groups, layout.groups)
    )
    qkv_rope.launch_forward(packed, bias, tables, positions, 1, heads, layout)
    qkv_rope.launch_backward(heads, tables, positions, 1, packed, bias, layout)


def launches() -> dict[str, Callable[[], None]]:
    """Launch by label: operation, model, dtype."""
    table: dict[str, Callable[[], None]] = {}
    for label, dtype in DTYPES.items():
        for model, width in MLP_WIDTHS.items():
            table[f"swiglu {model} {label}"] = lambda width=width, dtype=dtype: launch_swiglu(width, dtype)
        for model, layout in ATTENTION.items():
            for name, given in (("qkv_rope", False), ("qkv_rope packed", True)):
                table[f"{name} {model} {label}"] = lambda layout=layout, dtype=dtype, given=given: launch_qkv_rope(
                    layout, dtype, given
                )
        for model, hidden in HIDDEN.items():
            for name, adds in (("rms_norm", False), ("add_rms_norm", True)):
                table[f"{name} {model} {label}"] = lambda hidden=hidden, dtype=dtype, adds=adds: launch_rms_norm(
                    hidden, dtype, adds
                )
    return table


def facts(label: str, launch: Callable[[], None], architecture: int) -> list[dict[str, object]]:
    return [
        {
            "label": label,
            "kernel": code.name,
            "architecture": code.architecture,
            "registers": code.registers,
            "spilled": code.stack_bytes + code.local_bytes + code.spills,
            "shared": code.shared_bytes,
            "loads": code.count(r"LDG\.E[.\w]*"),
            "wide_loads": code.count(r"LDG\.E[.\w]*\.128[.\w]*"),
            "stores": code.count(r"STG\.E[.\w]*"),
            "wide_stores": code.count(r"STG\.E[.\w]*\.128[.\w]*"),
            "atomics": code.count(r"(?:ATOM|RED)G?\b[.\w]*"),
        }
        for code in compile_launches(launch, architecture)
    ]


if __name__ == "__main__":
    architecture, wanted = int(sys.argv[1]), sys.argv[2:]
    table = launches()
    print(json.dumps([row for label in wanted or table for row in facts(label, table[label], architecture)]))
