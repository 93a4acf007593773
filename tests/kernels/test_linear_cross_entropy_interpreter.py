"""The Triton kernels of `linear_cross_entropy`, line by line on a CPU, at sizes around their blocks."""

from __future__ import annotations

import linear_cross_entropy_checks as checks
import pytest
import torch

# Blocks in the interpreter: 128 x 256 x 64 in 16 bits where H is a multiple of 64, else 64 x 64 x 32.
SIZES = [((1,), 1, 1), ((0,), 8, 5), ((67, 2), 33, 131), ((129,), 64, 257)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lead", "hidden", "rows"), SIZES)
def test_kernels(interpreted, lead, hidden: int, rows: int, dtype: torch.dtype) -> None:
    interpreted(checks.check, lead, hidden, rows, dtype, "triton", z_loss=0.01 if rows > 1 else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_in_several_chunks_with_padding(interpreted, dtype: torch.dtype) -> None:
    interpreted(checks.check_in_small_chunks, (5, 2), 101, dtype, "triton")


@pytest.mark.parametrize(
    "check",
    [
        checks.check_all_ignored,
        checks.check_extreme_logits,
        checks.check_same_bits_again,
        checks.check_terms,
        checks.check_offsets,
        checks.check_label_out_of_range,
    ],
)
def test_kernels_in_special_cases(interpreted, check) -> None:
    interpreted(check, "triton")
