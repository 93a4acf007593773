"""Rotation in place: what only `ops.rope_` has; the rest is in test_op_properties.py."""

from __future__ import annotations

from typing import Any

import op_checks
import pytest
import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

LEADS = ((0,), (1,), (37,), (0, 2), (1, 1), (7, 3), (33, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Heads of q, heads of k, head size; rotated dimensions.
SHAPES = (((14, 2, 64), 64), ((3, 1, 10), 6), ((4, 4, 128), 128), ((5, 2, 8), 2))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("heads", "rotated"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_rotates_in_place_as_exactly_as_plain_torch(heads, rotated, dtype, inverse):
    for lead in LEADS:
        op_checks.check_rope(lead, heads, rotated, dtype, "reference", inverse=inverse)


@pytest.mark.parametrize("inverse", [False, True])
def test_triton_in_the_interpreter(interpreted: Any, inverse):
    for dtype in DTYPES:
        for heads, rotated in SHAPES[:2]:
            for lead in ((0,), (5,), (3, 2)):
                interpreted(op_checks.check_rope, lead, heads, rotated, dtype, "triton", inverse=inverse)


def tables(length: int = 16, half: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.rope_tables(10.0 ** -torch.arange(half, dtype=torch.float64), length)


def test_rotating_back_undoes_it_and_keys_may_be_left_out():
    q = torch.randn(9, 2, 3, 8)
    turned = q.clone()
    assert ops.rope_(turned, None, *tables())[1] is None
    assert not torch.allclose(turned[1:], q[1:])
    assert torch.equal(turned[0], q[0]), "position 0 is not rotated"
    ops.rope_(turned, None, *tables(), inverse=True)
    torch.testing.assert_close(turned, q)


def test_equals_what_qkv_rope_does_to_queries_and_keys():
    packed = torch.randn(11, 2, 2 * 5 * 8)
    q, k, _ = ops.qkv_rope(packed, *tables(), num_groups=2, head_dim=8)
    heads = packed.unflatten(-1, (2, 5, 8))
    own_q, own_k = heads[..., :3, :].flatten(-3, -2).contiguous(), heads[..., 3, :].contiguous()
    ops.rope_(own_q, own_k, *tables())
    assert torch.equal(own_q, q)
    assert torch.equal(own_k, k)


def test_a_position_outside_the_tables_is_an_error_on_a_cpu():
    with pytest.raises(IndexError):
        ops.rope_(torch.randn(2, 1, 8), None, *tables(), positions=torch.tensor([3, 16]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.randn(3, 8)}, "q has shape (3, 8)"),
        ({"q": torch.randn(3, 8, 2).transpose(1, 2)}, "q has strides"),
        ({"k": torch.randn(4, 2, 8)}, "k has shape (4, 2, 8)"),
        ({"k": torch.randn(3, 2, 8).half()}, "k has dtype torch.float16"),
        ({"cos": torch.randn(16, 5)}, "cos has shape (16, 5)"),
        ({"cos": torch.randn(2, 4), "sin": torch.randn(2, 4)}, "3 positions; expected at most 2"),
        ({"positions": torch.zeros(3)}, "positions has dtype torch.float32"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions has shape (4,)"),
    ],
)
def test_bad_input_is_named(change, words):
    cos, sin = tables()
    arguments = {"q": torch.randn(3, 2, 8), "k": torch.randn(3, 2, 8), "cos": cos, "sin": sin} | change
    with pytest.raises(ConfigError) as caught:
        ops.rope_(**arguments)
    assert words in str(caught.value)
