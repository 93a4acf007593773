"""The Triton kernels, line by line on a CPU, at sizes around their blocks."""

from __future__ import annotations

import op_checks
import pytest
import torch

from megatron_qwen.errors import ConfigError

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


def test_bf16_is_rounded_to_nearest_even(interpreted) -> None:
    interpreted(op_checks.check_rounding_of_bf16)


NORM_SHAPES = [(1, 3), (7,), (5, 2, 13), (3, 127), (9, 128), (2, 129), (0, 4), (2, 0, 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_rms_norm(interpreted, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    interpreted(op_checks.check_rms_norm, shape, dtype, "triton")
    interpreted(op_checks.check_add_rms_norm, shape, dtype, "triton")


@pytest.mark.parametrize(
    "check",
    [
        op_checks.check_rms_norm_of_another_weight_dtype,
        op_checks.check_rms_norm_of_one_column,
        op_checks.check_rms_norm_rows,
        op_checks.check_gradients_of_single_outputs,
        op_checks.check_same_bits_again,
        op_checks.check_rms_norm_offsets,
    ],
)
def test_rms_norm_in_special_cases(interpreted, check) -> None:
    interpreted(check, "triton")


def test_strides_that_are_no_rows_are_refused_not_copied(interpreted) -> None:
    with pytest.raises(ConfigError, match=r"x of shape \(2, 3, 4\) has strides \(4, 8, 1\)"):
        interpreted(op_checks.run_transposed, "triton")


def test_a_row_too_long_for_a_program_is_refused(interpreted) -> None:
    with pytest.raises(ConfigError, match="a row of 16385 does not fit one program"):
        interpreted(op_checks.run_long_row, "triton")


@pytest.mark.parametrize(("run", "name"), [(op_checks.run_fp64_weight, "weight"), (op_checks.run_fp64_bias, "bias")])
def test_parameters_in_fp64_are_refused(interpreted, run, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has dtype torch.float64, and kernels take float32"):
        interpreted(run, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lead", "heads", "rotated"), [((5, 2), (2, 7, 16), 16), ((9,), (3, 1, 10), 6), ((0, 2), (1, 1, 8), 8)]
)
def test_qkv_rope(interpreted, lead, heads, rotated: int, dtype: torch.dtype) -> None:
    interpreted(op_checks.check_qkv_rope, lead, heads, rotated, dtype, "triton", mscale=1.2)


@pytest.mark.parametrize(
    ("lead", "positions"),
    [((7,), [0, 1, 2, 0, 1, 2, 3]), ((3, 2), [9, 4, 50]), ((3, 2), [[9, 4], [50, 0], [1, 2]])],
    ids=["packed", "rows", "tokens"],
)
def test_qkv_rope_with_positions(interpreted, lead: tuple[int, ...], positions: list[int]) -> None:
    where = torch.tensor(positions, dtype=torch.int32)
    interpreted(op_checks.check_qkv_rope, lead, (2, 2, 8), 8, torch.float32, "triton", with_bias=False, positions=where)


@pytest.mark.parametrize(
    "check",
    [
        op_checks.check_gradients_at_foreign_strides,
        op_checks.check_positions_outside_the_tables,
        op_checks.check_qkv_rope_offsets,
    ],
)
def test_qkv_rope_in_special_cases(interpreted, check) -> None:
    interpreted(check, "triton")
