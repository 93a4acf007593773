"""What ptxas makes of the Triton kernels of a mixture of experts at real sizes, without a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from aot_process import SHARED, compiled

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed in this environment"
)

PROGRAM = "aot_moe_launches.py"
# Compiled in every run; the rest of the table is exhaustive.
SOME = ("routing a2.7b bf16", "permute a2.7b bf16", "experts a2.7b bf16", "block a2.7b bf16")
GEMMS = {"up_kernel", "down_kernel", "activation_backward_kernel", "weight_gradient_kernel"}


def check(row: dict[str, Any]) -> None:
    where = f"{row['kernel']} of {row['label']} on sm_{row['architecture']}: {row}"
    assert row["spilled"] == 0, where
    assert row["shared"] <= SHARED[row["architecture"]], where
    assert row["atomics"] == 0, f"results must not depend on the order of threads; {where}"
    if not row["label"].startswith(("experts", "block")) or row["kernel"] not in GEMMS or "fp32" in row["label"]:
        return
    if row["architecture"] == 90:
        assert row["wgmma"] > 0, where
        assert row["mma"] == 0, f"tensor cores by the instructions of an earlier architecture; {where}"
    else:
        assert row["mma"] > 0, where
    if "odd" not in row["label"]:
        assert row["wide_asynchronous"] > 0, f"tiles are not copied ahead, 16 bytes at a time; {where}"
        assert row["wide_stores"] > 0, where


def test_kernels_spill_nothing_and_use_tensor_cores() -> None:
    rows = compiled(PROGRAM, 90, *SOME)
    names = {row["kernel"] for row in rows}
    assert names > GEMMS | {"routing_forward_kernel", "order_place_kernel", "gather_sum_kernel", "combine_kernel"}
    for row in rows:
        check(row)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", [90, 80])
def test_every_launch_of_the_table(architecture: int) -> None:
    for row in compiled(PROGRAM, architecture):
        check(row)
