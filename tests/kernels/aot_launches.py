"""Compiles the launches below as they would be on a device and prints what came out.

Usage: aot_launches.py ARCHITECTURE [--table] [LABEL ...]; parts of labels will do. JSON, or with --table the rows of
the table in docs/kernels.md. Meta tensors: real sizes, no memory.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable

import torch

from megatron_qwen.kernels.linear_cross_entropy import kernel as linear_cross_entropy
from megatron_qwen.kernels.qkv_rope import kernel as qkv_rope
from megatron_qwen.kernels.qkv_rope.layout import Layout
from megatron_qwen.kernels.rms_norm import kernel as rms_norm
from megatron_qwen.kernels.rope import kernel as rope
from megatron_qwen.kernels.swiglu import kernel as swiglu
from megatron_qwen.model.presets import PRESETS
from megatron_qwen.testing.aot import compile_launches

TOKENS = 32768
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Every size in bf16; in the other dtypes the smallest, the middle and the one that no block divides.
SIZES = ("0.5b", "1.5b", "3b", "7b", "14b", "32b", "72b", "72b-tp8", "odd")
SIZES_IN_OTHER_DTYPES = ("0.5b", "7b", "odd")


def mlp_width(size: str) -> int:
    """Columns of swiglu's result on a tensor-parallel rank."""
    if size == "odd":
        return 1001
    name, _, ranks = size.partition("-tp")
    return PRESETS[f"qwen2.5-{name}"].intermediate_size // int(ranks or 1)


def hidden_size(size: str) -> int:
    return 1001 if size == "odd" else PRESETS[f"qwen2.5-{size.partition('-tp')[0]}"].hidden_size


def attention_layout(size: str) -> Layout:
    """Heads of a tensor-parallel rank."""
    if size == "odd":
        return Layout(groups=3, per_group=4, head_dim=50, half=15)
    name, _, ranks = size.partition("-tp")
    config = PRESETS[f"qwen2.5-{name}"]
    return Layout(
        groups=config.num_key_value_heads // int(ranks or 1),
        per_group=config.num_attention_heads // config.num_key_value_heads + 2,
        head_dim=config.head_dim,
        half=config.head_dim // 2,
    )


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


def launch_qkv_rope(layout: Layout, dtype: torch.dtype, with_positions: bool) -> None:
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


def launch_rope(layout: Layout, dtype: torch.dtype) -> None:
    counts = layout.groups * (layout.per_group - 2), layout.groups
    q, k = (meta(TOKENS, 1, each, layout.head_dim, dtype=dtype) for each in counts)
    tables = (meta(TOKENS, layout.half, dtype=torch.float32), meta(TOKENS, layout.half, dtype=torch.float32))
    rope.launch_rope(q, k, tables, meta(TOKENS, dtype=torch.int32), 1, inverse=False)


def launch_linear_cross_entropy(hidden_size: int, rows: int, dtype: torch.dtype) -> None:
    hidden, weight = meta(TOKENS, hidden_size, dtype=dtype), meta(rows, hidden_size, dtype=dtype)
    labels = meta(TOKENS, dtype=torch.int64)
    per_token = meta(TOKENS, dtype=torch.float32)
    linear_cross_entropy.launch_forward(hidden, weight, labels, rows, per_token, per_token)
    part = slice(0, linear_cross_entropy.SMALLEST_CHUNK)
    out = meta(TOKENS, part.stop, dtype=dtype)
    linear_cross_entropy.launch_logit_gradient(hidden, weight, labels, *[per_token] * 3, part, out)


def launches() -> dict[str, Callable[[], None]]:
    """Launch by label: operation, size, dtype."""
    table: dict[str, Callable[[], None]] = {}
    for label, dtype in DTYPES.items():
        for size in SIZES if label == "bf16" else SIZES_IN_OTHER_DTYPES:
            table[f"swiglu {size} {label}"] = functools.partial(launch_swiglu, mlp_width(size), dtype)
            for name, adds in (("rms_norm", False), ("add_rms_norm", True)):
                table[f"{name} {size} {label}"] = functools.partial(launch_rms_norm, hidden_size(size), dtype, adds)
            for name, given in (("qkv_rope", False), ("qkv_rope packed", True)):
                layout = attention_layout(size)
                table[f"{name} {size} {label}"] = functools.partial(launch_qkv_rope, layout, dtype, given)
            table[f"rope {size} {label}"] = functools.partial(launch_rope, attention_layout(size), dtype)
            rows = 151_935 if size == "odd" else PRESETS[f"qwen2.5-{size.partition('-tp')[0]}"].vocab_size
            table[f"linear_cross_entropy {size} {label}"] = functools.partial(
                launch_linear_cross_entropy, hidden_size(size), rows, dtype
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
            "wide_copies": code.count(r"LDGSTS\.E[.\w]*\.128[.\w]*") + code.count(r"UTMALDG[.\w]*"),
            # Products of sixteen-bit matrices on tensor cores; by a whole warp group on sm_90.
            "wgmma": code.count(r"HGMMA[.\w]*"),
            "mma": code.count(r"HMMA[.\w]*"),
            "stores": code.count(r"STG\.E[.\w]*"),
            "wide_stores": code.count(r"STG\.E[.\w]*\.128[.\w]*"),
            "atomics": code.count(r"(?:ATOM|RED)G?\b[.\w]*"),
        }
        for code in compile_launches(launch, architecture)
    ]


def markdown(row: dict[str, object]) -> str:
    cells = (
        f"`{row['kernel']}`, {row['label']}",
        row["registers"],
        row["spilled"],
        f"{row['loads']}, {row['wide_loads']}",
        f"{row['stores']}, {row['wide_stores']}",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    architecture, wanted = int(sys.argv[1]), [each for each in sys.argv[2:] if each != "--table"]
    table = {
        label: launch for label, launch in launches().items() if not wanted or any(part in label for part in wanted)
    }
    rows = [row for label, launch in table.items() for row in facts(label, launch, architecture)]
    print("\n".join(map(markdown, rows)) if "--table" in sys.argv else json.dumps(rows))
