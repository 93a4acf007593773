"""What ptxas makes of every Triton kernel at real sizes, for sm_90 and sm_80, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed in this environment"
)

PROGRAM = Path(__file__).parent / "aot_launches.py"
# Compiled in every run; the rest of the table is exhaustive.
SOME = ("swiglu 7b bf16", "swiglu odd bf16")
# At 64 registers, 1024 threads fit a multiprocessor: half of all, which saturates memory with 16-byte accesses.
MOST_REGISTERS = {"swiglu_forward_kernel": 40, "swiglu_backward_kernel": 40}


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
    assert row["registers"] <= MOST_REGISTERS[row["kernel"]], where
    assert row["shared"] <= 48 * 1024, where
    assert row["atomics"] == 0, f"results must not depend on the order of threads; {where}"
    if "odd" not in row["label"]:
        assert row["wide_loads"] > 0, where
        assert (row["wide_loads"], row["wide_stores"]) == (row["loads"], row["stores"]), where


@pytest.mark.parametrize("architecture", [90, 80])
def test_kernels_spill_nothing_and_move_16_bytes_per_access(architecture: int) -> None:
    for row in compiled(architecture, *SOME):
        check(row)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_of_the_table(architecture: int) -> None:
    rows = compiled(architecture)
    assert {row["kernel"] for row in rows} == set(MOST_REGISTERS)
    for row in rows:
        check(row)
