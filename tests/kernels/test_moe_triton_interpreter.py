"""The Triton kernels of a mixture of experts, line by line on a CPU, at sizes around their blocks."""

from __future__ import annotations

import moe_checks
import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "renormalize"),
    [(1, 1, 1, True), (129, 7, 2, False), (61, 60, 4, True), (33, 64, 8, False), (5, 129, 129, True)],
)
def test_routing(interpreted, tokens: int, experts: int, topk: int, renormalize: bool, dtype: torch.dtype) -> None:
    interpreted(moe_checks.check_routing, tokens, experts, topk, renormalize, dtype, "triton")


@pytest.mark.parametrize(
    "check",
    [
        moe_checks.check_routing_of_no_tokens,
        moe_checks.check_routing_of_equal_logits,
        moe_checks.check_routing_same_bits_again,
        moe_checks.check_routing_offsets,
    ],
)
def test_routing_in_special_cases(interpreted, check) -> None:
    interpreted(check, "triton")


@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "empty"),
    [(0, 4, 2, ()), (1, 1, 1, ()), (131, 60, 4, (0, 7, 59)), (13, 8, 8, ()), (257, 5, 1, (0, 1, 2, 4))],
)
def test_order(interpreted, tokens: int, experts: int, topk: int, empty: tuple[int, ...]) -> None:
    interpreted(moe_checks.check_order, tokens, experts, topk, empty, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "topk", "hidden"), [(0, 4, 2, 8), (1, 1, 1, 3), (7, 5, 2, 1025), (5, 4, 4, 24), (5, 3, 2, 0)]
)
def test_permute(interpreted, tokens: int, experts: int, topk: int, hidden: int, dtype: torch.dtype) -> None:
    interpreted(moe_checks.check_permute, tokens, experts, topk, hidden, dtype, "triton")


def test_permute_beyond_32_bit_offsets(interpreted) -> None:
    interpreted(moe_checks.check_permute_offsets, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", moe_checks.LAYERS.values(), ids=moe_checks.LAYERS)
def test_experts(interpreted, layer: moe_checks.Layer, dtype: torch.dtype) -> None:
    interpreted(moe_checks.check_moe_mlp, layer, dtype, "triton")
    interpreted(moe_checks.check_grouped_mlp, layer, dtype, "triton")


def test_experts_recomputed(interpreted) -> None:
    interpreted(moe_checks.check_moe_mlp, moe_checks.LAYERS["empty experts"], torch.float32, "triton", recompute=True)


@pytest.mark.parametrize(
    ("name", "renormalize", "dtype"),
    [
        ("one token", True, torch.float32),
        ("empty experts", False, torch.bfloat16),
        ("all on one", False, torch.float16),
        ("all experts", True, torch.float32),
    ],
)
def test_routing_order_and_experts_together(interpreted, name: str, renormalize: bool, dtype: torch.dtype) -> None:
    interpreted(moe_checks.check_block, moe_checks.LAYERS[name], renormalize, dtype, "triton")


def test_matrices_beyond_32_bit_offsets(interpreted) -> None:
    interpreted(moe_checks.check_matrices_beyond_32_bits, "triton")


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_as_large_as_the_permuted_rows_is_kept(interpreted, recompute: bool) -> None:
    interpreted(moe_checks.check_kept, recompute, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["same", "wider"])
def test_gradient_buffers_are_added_to(interpreted, dtype: torch.dtype) -> None:
    interpreted(moe_checks.check_main_grads, dtype, "triton")


def test_experts_give_the_same_bits_again(interpreted) -> None:
    interpreted(moe_checks.check_moe_same_bits_again, "triton")
