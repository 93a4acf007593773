"""What ptxas makes of the Triton kernels of sparse prefill at real sizes, without a GPU."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
from aot_process import SHARED, compiled

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed in this environment"
)

PROGRAM = "aot_sparse_launches.py"
KERNELS = Path(__file__).parents[2] / "kernels" / "sparse_attention"


def check(architecture: int, *labels: str) -> None:
    """The launches run with meta tensors, so a host that reads a number of one fails here, too."""
    rows = compiled(PROGRAM, architecture, *labels)
    names = {
        node.name
        for file in KERNELS.glob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    # Keys are rotated by the kernel of dense attention.
    assert {row["kernel"] for row in rows} == names | {"rotate_heads_kernel"}
    for row in rows:
        where = f"{row['kernel']} of {row['label']} on sm_{architecture}: {row}"
        assert row["spilled"] == row["atomics"] == 0, where
        assert row["shared"] <= SHARED[architecture], where
        if row["kernel"] == "sparse_forward_kernel" and "fp32" not in row["label"]:
            assert row["wide_copies"] > 0, f"tiles are not copied ahead, 16 bytes at a time; {where}"
            assert row["wgmma" if architecture == 90 else "mma"] > 0, f"no tensor cores; {where}"


def test_kernels_spill_nothing_and_use_tensor_cores() -> None:
    check(90, "sparse chunks 128 bf16")


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_of_the_table(architecture: int) -> None:
    check(architecture)
