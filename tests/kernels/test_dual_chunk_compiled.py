"""What ptxas makes of the Triton kernels of Dual Chunk Attention at real sizes, without a GPU."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from aot_process import SHARED, compiled

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed in this environment"
)

PROGRAM = "aot_dual_chunk_launches.py"
KERNELS = Path(__file__).parents[2] / "kernels" / "dual_chunk_attention"
# Compiled in every run: the forms that take most registers. The rest of the table is exhaustive.
SOME = {
    90: ("attention packed chunks 128 bf16", "attention packed chunks 64 bf16", "decode chunks 128 bf16"),
    80: ("attention packed chunks 128 bf16",),
}
PRODUCTS = {"dca_forward_kernel", "dca_queries_backward_kernel", "dca_keys_backward_kernel"}


def check(row: dict[str, Any]) -> None:
    where = f"{row['kernel']} of {row['label']} on sm_{row['architecture']}: {row}"
    assert row["spilled"] == 0, where
    assert row["shared"] <= SHARED[row["architecture"]], where
    assert row["atomics"] == 0, f"results must not depend on the order of threads; {where}"
    if "fp32" in row["label"]:
        return
    assert row["wide_loads"] + row["wide_copies"] > 0, where
    if row["kernel"] in PRODUCTS:
        assert row["wide_copies"] > 0, f"tiles are not copied ahead, 16 bytes at a time; {where}"
        assert row["wgmma" if row["architecture"] == 90 else "mma"] > 0, f"no tensor cores; {where}"
        # Products by the instructions of an earlier architecture.
        assert row["architecture"] == 80 or row["mma"] == 0, where
    if row["kernel"] == "dca_decode_kernel":
        # 16 query heads are too few rows for a warp group's product.
        assert row["mma"] > 0, where


@pytest.mark.parametrize("architecture", SOME)
def test_kernels_spill_nothing_and_use_tensor_cores(architecture: int) -> None:
    rows = compiled(PROGRAM, architecture, *SOME[architecture])
    if architecture == 90:
        names = {
            node.name
            for file in KERNELS.glob("*.py")
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        }
        assert {row["kernel"] for row in rows} == names, "a kernel needs a launch in aot_dual_chunk_launches.py"
    for row in rows:
        check(row)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_of_the_table(architecture: int) -> None:
    for row in compiled(PROGRAM, architecture):
        check(row)
