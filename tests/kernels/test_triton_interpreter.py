"""The Triton kernels, line by line on a CPU, at sizes around their blocks."""

from __future__ import annotations

import op_checks
import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7,), (5, 2, 13), (3, 1023), (2, 1024), (2, 1025), (0, 4), (3, 0)])
def test_swiglu(interpreted, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    interpreted(op_checks.check_swiglu, shape, dtype, "triton")


def test_swiglu_at_extremes_and_expanded_gradients(interpreted) -> None:
    interpreted(op_checks.check_swiglu_extremes, "triton")
    interpreted(op_checks.check_gradient_of_a_sum, "triton")


def test_swiglu_beyond_32_bit_offsets(interpreted) -> None:
    interpreted(op_checks.check_swiglu_offsets, "triton")
