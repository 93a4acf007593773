"""CUDA's gradient of Dual Chunk Attention run on the CPU (csrc/tests/emulation), through the operation.

Output and lse come from the definition's backend, so these tests say nothing of the forward kernel.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import dual_chunk_checks as checks
import pytest
import torch
from dual_chunk_checks import Example
from emulated_extension import Emulation
from op_checks import random

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.testing.compare import assert_close_to_fp64
from megatron_qwen.testing.poison import poisoned_outputs, surrounded

BF16, FP16 = torch.bfloat16, torch.float16
PASSES = ["attention_row_terms", "attention_keys_backward", "attention_queries_backward"]
RELEASED, PAPER = ops.ChunkLayout.released, ops.ChunkLayout.paper

# Tiles are 128 rows or keys, steps 64.
EXAMPLES = {
    "one token": (Example(lengths=(1,), heads=(1, 1), size=64, batch=1), BF16),
    "less than a tile": (Example(lengths=(127,), heads=(2, 1), size=64, chunks=RELEASED(60, 3), batch=1), BF16),
    "a tile": (Example(lengths=(128,), heads=(1, 1), size=64, chunks=None, batch=2), FP16),
    "more than a tile": (Example(lengths=(129,), heads=(1, 1), size=128, chunks=PAPER(200, 60), batch=1), BF16),
    "chunks of whole tiles": (
        Example(lengths=(257,), heads=(1, 1), size=64, chunks=PAPER(160, 32), batch=1, with_temperature=True),
        FP16,
    ),
    "14 heads over 2": (
        Example(lengths=(31,), heads=(14, 2), size=64, chunks=PAPER(20, 2), batch=1, with_temperature=True),
        BF16,
    ),
    "7 heads over 1": (Example(lengths=(67,), heads=(7, 1), size=128, chunks=RELEASED(43, 7), batch=1), FP16),
    "packed": (
        Example(
            lengths=(5, 0, 35, 3, 0, 131),
            new_rows=(5, 0, 6, 5, 0, 131),
            heads=(2, 1),
            size=64,
            chunks=RELEASED(70, 8),
            with_temperature=True,
        ),
        BF16,
    ),
    "packed, plain": (Example(lengths=(5, 0, 35, 3, 0, 70), heads=(2, 2), size=128, chunks=None), FP16),
    "new rows": (
        Example(
            lengths=(200,),
            new_rows=(70,),
            heads=(2, 1),
            size=64,
            chunks=RELEASED(70, 10),
            batch=2,
            keys_rotated=True,
        ),
        BF16,
    ),
}
# One chunk after another, sizes of which none divides another.
GRID = [
    (Example(lengths=(length,), heads=(2, 1), size=size, chunks=chunks, batch=1, with_temperature=size == 64), dtype)
    for dtype in (BF16, FP16)
    for size in (64, 128)
    for chunks in (None, RELEASED(97, 24), PAPER(97, 24), RELEASED(40, 39), RELEASED(129, 1), RELEASED(64, 0))
    for length in (63, 65, 191, 193, 263)
]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    with ops.use_backend("reference"):
        return ops.dual_chunk_attention(q, k, v, **options)


def gradients(
    given: list[torch.Tensor], output: torch.Tensor, lse: torch.Tensor, options: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv by the kernels; given are q, k, v and the output's gradient."""
    *inputs, grad = given
    with ops.use_backend("cuda"), poisoned_outputs():
        return ops.dual_chunk_attention_backward(grad, *inputs, output, lse, **options)


def check(example: Example, dtype: torch.dtype) -> None:
    """By the fp64 rule, with poisoned outputs and inputs surrounded by NaN."""
    given, options = example.inputs(dtype), example.options(dtype)
    found = gradients([surrounded(each) for each in given], *forward(*given[:3], options), options)
    expected = []
    for wide in (dtype, torch.float64):
        leaves = [each.to(wide).requires_grad_() for each in given[:3]]
        expected.append(torch.autograd.grad(checks.definition(example, *leaves)[0], leaves, given[3].to(wide)))
    for name, ours, plain, exact in zip(("dq", "dk", "dv"), found, *expected, strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        assert_close_to_fp64(ours, plain, exact, name=name)


@pytest.mark.parametrize(("example", "dtype"), EXAMPLES.values(), ids=EXAMPLES)
def test_gradients_are_as_exact_as_plain_torch(emulation: Emulation, example: Example, dtype: torch.dtype) -> None:
    check(example, dtype)
    rotations = 1 if example.keys_rotated else 2
    assert emulation.calls == ["attention_rotate"] * rotations + PASSES


@pytest.mark.exhaustive
@pytest.mark.parametrize(("example", "dtype"), GRID)
def test_all_lengths_and_layouts(emulation: Emulation, example: Example, dtype: torch.dtype) -> None:
    check(example, dtype)


def test_no_tokens_no_launch(emulation: Emulation) -> None:
    for example in (
        Example(lengths=(0,), heads=(2, 1), size=64, batch=2),
        Example(lengths=(0, 0), heads=(2, 1), size=64),
        Example(lengths=(), heads=(2, 1), size=64),
    ):
        given, options = example.inputs(BF16), example.options(BF16)
        found = gradients(given, *forward(*given[:3], options), options)
        assert [each.shape for each in found] == [each.shape for each in given[:3]]
    example = Example(lengths=(9,), new_rows=(0,), heads=(2, 1), size=64, batch=1)
    given, options = example.inputs(BF16), example.options(BF16)
    _, dk, dv = gradients(given, *forward(*given[:3], options), options)
    assert not dk.any()
    assert not dv.any()
    assert not emulation.calls


def test_the_same_bits_again(emulation: Emulation) -> None:
    example = dataclasses.replace(EXAMPLES["packed"][0], lengths=(131, 0, 70), new_rows=None)
    given, options = example.inputs(BF16), example.options(BF16)
    kept = forward(*given[:3], options)
    once, again = (gradients(given, *kept, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_sequences_do_not_reach_one_another(emulation: Emulation) -> None:
    """Steps of 64 rows end within a sequence: those behind, here NaN, must not get in even times 0."""
    example = Example(lengths=(70, 9, 75), heads=(2, 1), size=64, chunks=RELEASED(48, 16))
    given, options = example.inputs(BF16), example.options(BF16)
    kept = forward(*given[:3], options)
    clean = gradients(given, *kept, options)
    for each in (*given, kept[0]):
        each[70:79] = float("nan")
    soiled = gradients(given, *kept, options)
    for a, b in zip(clean, soiled, strict=True):
        assert torch.equal(a[:70], b[:70])
        assert torch.equal(a[79:], b[79:])
        assert b[70:79].isnan().any()


@pytest.mark.parametrize("chunks", [RELEASED(50, 20), None])
def test_parts_of_the_keys_under_one_lse(emulation: Emulation, chunks: ops.ChunkLayout | None) -> None:
    """As ring attention has it: the lse is that of all keys, some rows see none of a part; heads are views."""
    rows, columns, start, cut = 40, 100, 70, 90
    wide = [random((1, each, 4, 64), BF16, seed=seed) for seed, each in enumerate((rows, columns, columns, rows))]
    q, k, v, grad = wide[0][:, :, 1:3], wide[1][:, :, 2:3], wide[2][:, :, :1], wide[3][:, :, :2]
    common = {"chunks": chunks, "tables": checks.tables(128, BF16, 64), "query_start": start}
    output, lse = forward(q, k, v, common)
    parts = [slice(0, cut), slice(cut, columns)]
    dq, dk, dv = zip(
        *(gradients([q, k[:, p], v[:, p], grad], output, lse, {**common, "key_start": p.start}) for p in parts),
        strict=True,
    )
    found = (sum(each.double() for each in dq), torch.cat(dk, 1), torch.cat(dv, 1))
    exact = []
    for dtype in (BF16, torch.float64):
        leaves = [each.to(dtype).requires_grad_() for each in (q, k, v)]
        cos, sin = (each.to(torch.promote_types(dtype, torch.float32)) for each in common["tables"])
        with ops.use_backend("reference"):
            result = ops.dual_chunk_attention(*leaves, **{**common, "tables": (cos, sin)})[0]
        exact.append(torch.autograd.grad(result, leaves, grad.to(dtype)))
    for name, ours, simple, right in zip(("dq", "dk", "dv"), found, *exact, strict=True):
        # dq is the sum of two rounded ones.
        assert_close_to_fp64(ours.to(BF16), simple, right, roundings=2.0, name=name)


def test_heads_that_come_rotated_have_no_rotation_to_turn_back(emulation: Emulation) -> None:
    example = Example(lengths=(71,), heads=(2, 1), size=128, chunks=None, batch=1)
    given, options = example.inputs(FP16), {**example.options(FP16), "tables": None}
    found = gradients(given, *forward(*given[:3], options), options)
    expected = []
    for dtype in (FP16, torch.float64):
        leaves = [each.to(dtype).requires_grad_() for each in given[:3]]
        with ops.use_backend("reference"):
            output = ops.dual_chunk_attention(*leaves, **options)[0]
        expected.append(torch.autograd.grad(output, leaves, given[3].to(dtype)))
    for ours, plain, exact in zip(found, *expected, strict=True):
        assert_close_to_fp64(ours, plain, exact)
    assert emulation.calls == PASSES


def test_tables_with_a_factor(emulation: Emulation) -> None:
    """YaRN scales cos and sin: the sum over segments is turned on by quotients of angles, which must undo it."""
    example = Example(lengths=(75,), heads=(1, 1), size=64, chunks=RELEASED(30, 10), batch=1)
    given, options = example.inputs(FP16), example.options(FP16)
    options["tables"] = tuple(0.8 * each for each in options["tables"])
    found = gradients(given, *forward(*given[:3], options), options)
    expected = []
    for dtype in (FP16, torch.float64):
        leaves = [each.to(dtype).requires_grad_() for each in given[:3]]
        tables = tuple(each.to(torch.promote_types(dtype, torch.float32)) for each in options["tables"])
        with ops.use_backend("reference"):
            output = ops.dual_chunk_attention(*leaves, **{**options, "tables": tables})[0]
        expected.append(torch.autograd.grad(output, leaves, given[3].to(dtype)))
    for name, ours, plain, exact in zip(("dq", "dk", "dv"), found, *expected, strict=True):
        assert_close_to_fp64(ours, plain, exact, name=name)


def test_other_dtypes_are_refused_with_the_reason(emulation: Emulation) -> None:
    example = Example(lengths=(3,), heads=(1, 1), size=64, batch=1)
    given, options = example.inputs(torch.float32), example.options(torch.float32)
    with pytest.raises(ConfigError, match="its CUDA kernel takes bfloat16 and float16"):
        gradients(given, *forward(*given[:3], options), options)
    assert not emulation.calls


def test_the_extension_checks_its_arguments_itself(emulation: Emulation) -> None:
    rows = {"positions": 0, "start": 0, "out": 64, "dtype": "bfloat16"}
    common = {"x": (64, 0, 64, 64), "tables": (64, 64, 9), "chunks": (8, 8, 7, 3, False), "shape": (1, 1, 1, 64)}
    rotate = emulation.module.attention_rotate
    with pytest.raises(ValueError, match="attention_rotate: head_dim = 80; expected 64 or 128"):
        rotate(**{**common, **rows, "shape": (1, 1, 1, 80)}, copies=1)
    with pytest.raises(ValueError, match="attention_rotate: copies = 2; expected 1 or 3"):
        rotate(**common, **rows, copies=2)
    with pytest.raises(ValueError, match="dtype is float32; expected bfloat16 or float16"):
        rotate(**{**common, **rows, "dtype": "float32"}, copies=1)
    with pytest.raises(ValueError, match="stride of x = 68; expected a multiple of 8 elements"):
        rotate(**{**common, **rows, "x": (64, 0, 68, 64)}, copies=1)
