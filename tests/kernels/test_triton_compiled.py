"""What ptxas makes of every Triton kernel at real sizes, for sm_90 and sm_80, without a GPU."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aot_process import compiled

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed in this environment"
)

PROGRAM = "aot_launches.py"
# Compiled in every run: each kernel, both head sizes, and those that ptxas was once seen to spill in.
SOME = {
    90: (
        *("swiglu 7b bf16", "swiglu odd bf16", "add_rms_norm 7b bf16", "linear_cross_entropy 7b bf16"),
        *("qkv_rope packed 0.5b bf16", "qkv_rope packed 14b bf16", "rope 7b bf16"),
    ),
    80: ("swiglu 7b bf16", "add_rms_norm 0.5b bf16", "qkv_rope packed 3b bf16"),
}
KERNELS = Path(__file__).parents[2] / "kernels"
# Compiled by test_moe_triton_compiled.py, test_dual_chunk_compiled.py and test_sparse_compiled.py.
ELSEWHERE = ("dual_chunk_attention", "grouped_mlp", "moe_permute", "moe_routing", "sparse_attention")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Registers per thread, shared bytes, and the loads and stores of single numbers; None where widths vary."""

    registers: int
    narrow_loads: int | None = 0
    narrow_stores: int | None = 0
    shared: int = 48 * 1024


# 2048 threads fit a multiprocessor at 32 registers, 1024 at 64, 512 at 128: rows of 8192 are held by 512 threads.
LIMITS = {
    "swiglu_forward_kernel": Limits(registers=40),
    "swiglu_backward_kernel": Limits(registers=40),
    "rms_norm_forward_kernel": Limits(registers=64, narrow_stores=1),
    "rms_norm_backward_kernel": Limits(registers=128, narrow_loads=1),
    # One position per token, of which forward has four.
    "qkv_rope_forward_kernel": Limits(registers=80, narrow_loads=4),
    "qkv_rope_backward_kernel": Limits(registers=96, narrow_loads=1),
    "rope_kernel": Limits(registers=80, narrow_loads=4),
    "column_sum_kernel": Limits(registers=40, narrow_stores=1),
    # GEMMs: sums in registers, operands by asynchronous copies; labels and statistics are one number per token.
    "logit_statistics_kernel": Limits(registers=255, narrow_loads=None, narrow_stores=2, shared=160 * 1024),
    "logit_gradient_kernel": Limits(registers=255, narrow_loads=None, shared=160 * 1024),
}


def check(row: dict[str, Any]) -> None:
    where = f"{row['kernel']} of {row['label']} on sm_{row['architecture']}: {row}"
    assert row["spilled"] == 0, where
    limits = LIMITS[row["kernel"]]
    assert row["shared"] <= limits.shared, where
    assert row["atomics"] == 0, f"results must not depend on the order of threads; {where}"
    if row["kernel"].startswith("logit_") and "fp32" not in row["label"]:
        assert row["wgmma" if row["architecture"] == 90 else "mma"] > 0, f"no tensor cores; {where}"
    if "odd" in row["label"]:
        return
    assert row["registers"] <= limits.registers, where
    if limits.narrow_loads is not None:
        assert row["wide_loads"] > 0, where
        assert row["loads"] - row["wide_loads"] <= limits.narrow_loads, where
    elif "cross_entropy" in row["label"]:
        assert row["wide_copies"] + row["wide_loads"] > 0, where
    if limits.narrow_stores is not None:
        assert row["stores"] - row["wide_stores"] <= limits.narrow_stores, where


def test_every_kernel_is_compiled_here() -> None:
    names = {
        node.name
        for file in KERNELS.rglob("*.py")
        if file.parent.name not in ELSEWHERE
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert names == set(LIMITS), "a kernel needs a launch in aot_launches.py and limits here"


@pytest.mark.parametrize("architecture", SOME)
def test_kernels_spill_nothing_and_move_16_bytes_per_access(architecture: int) -> None:
    rows = compiled(PROGRAM, architecture, *SOME[architecture])
    if architecture == 90:
        assert {row["kernel"] for row in rows} == set(LIMITS)
    for row in rows:
        check(row)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_of_the_table(architecture: int) -> None:
    rows = compiled(PROGRAM, architecture)
    assert {row["kernel"] for row in rows} == set(LIMITS)
    for row in rows:
        check(row)
