"""What ptxas makes of every Triton kernel at real sizes, for sm_90 and sm_80, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed in this environment"
)

PROGRAM = Path(__file__).parent / "aot_launches.py"
# Compiled in every run; the rest of the table is exhaustive.
SOME = ("swiglu 7b bf16", "swiglu odd bf16", "add_rms_norm 7b bf16", "qkv_rope packed 7b bf16")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Registers per thread, and the loads and stores of one number per row or of results, which are narrow."""

    registers: int
    narrow_loads: int = 0
    narrow_stores: int = 0


# 2048 threads fit a multiprocessor at 32 registers, 1024 at 64, 512 at 128: rows of 8192 are held by 512 threads.
LIMITS = {
    "swiglu_forward_kernel": Limits(registers=40),
    "swiglu_backward_kernel": Limits(registers=40),
    "rms_norm_forward_kernel": Limits(registers=64, narrow_stores=1),
    "rms_norm_backward_kernel": Limits(registers=128, narrow_loads=1),
    # One position per token, of which forward has four.
    "qkv_rope_forward_kernel": Limits(registers=80, narrow_loads=4),
    "qkv_rope_backward_kernel": Limits(registers=96, narrow_loads=1),
    "column_sum_kernel": Limits(registers=40, narrow_stores=1),
}


def compiled(architecture: int, *labels: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), str(architecture), *labels]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    assert rows
    return rows


def check(row: dict[str, Any]) -> None:
    where = f"{row['kernel']} of {row['label']} on sm_{row['architecture']}: {row}"
    assert row["spilled"] == 0, where
    limits = LIMITS[row["kernel"]]
    assert row["shared"] <= 48 * 1024, where
    assert row["atomics"] == 0, f"results must not depend on the order of threads; {where}"
    if "odd" not in row["label"]:
        assert row["registers"] <= limits.registers, where
        assert row["wide_loads"] > 0, where
        assert row["loads"] - row["wide_loads"] <= limits.narrow_loads, where
        assert row["stores"] - row["wide_stores"] <= limits.narrow_stores, where


def test_kernels_spill_nothing_and_move_16_bytes_per_access() -> None:
    rows = compiled(90, *SOME)
    assert {row["kernel"] for row in rows} == set(LIMITS)
    for row in rows:
        check(row)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_of_the_table(architecture: int) -> None:
    rows = compiled(architecture)
    assert {row["kernel"] for row in rows} == set(LIMITS)
    for row in rows:
        check(row)
