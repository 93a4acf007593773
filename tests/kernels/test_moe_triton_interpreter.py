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
