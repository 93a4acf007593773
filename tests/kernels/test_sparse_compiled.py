"""What ptxas makes of the Triton kernels of sparse prefill at real sizes, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed in this environment"
)

PROGRAM = Path(__file__).parent / "aot_sparse_launches.py"
KERNELS = {"rotate_heads_kernel", "bitmap_kernel", "sparse_forward_kernel"}


def check(architecture: int, *labels: str) -> None:
    """The launches run with meta tensors, so a host that reads a number of one fails here, too."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), str(architecture), *labels]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        where = f"{row['kernel']} of {row['label']} on sm_{architecture}: {row}"
        assert row["spilled"] == row["atomics"] == 0, where
        if row["kernel"] == "sparse_forward_kernel" and "fp32" not in row["label"]:
            assert row["wide_copies"] > 0, f"tiles are not copied ahead, 16 bytes at a time; {where}"
            assert row["wgmma" if architecture == 90 else "mma"] > 0, f"no tensor cores; {where}"


def test_kernels_spill_nothing_and_use_tensor_cores() -> None:
    check(90, "sparse chunks 128 bf16")


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_of_the_table(architecture: int) -> None:
    check(architecture)
