"""The CUDA forward kernel of Dual Chunk Attention run on the CPU (csrc/tests/emulation), through the operation: wgmma
by its matrix descriptors and registers, TMA by its tensor maps, barriers, and all that is asynchronous as late as it
may happen. Its tiles and blocks of keys are 128 rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from dual_chunk_checks import Example, definition
from emulated_extension import Emulation
from op_checks import random

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.dual_chunk_attention import cuda_limits
from megatron_qwen.testing.compare import assert_close_to_fp64
from megatron_qwen.testing.poison import poisoned_outputs, surrounded

BF16, FP16 = torch.bfloat16, torch.float16
LAUNCHES = ["attention_rotate", "attention_forward"]
# Chunks within a tile, tiles within a chunk, windows longer than a chunk; the second of "two tiles" needs no rotation
# of its own for the previous chunk.
LAYOUTS = {
    "short": ops.ChunkLayout.released(8, 5),
    "wide window": ops.ChunkLayout.paper(20, 15),
    "no window": ops.ChunkLayout.released(48, 0),
    "one tile": ops.ChunkLayout.paper(160, 32),
    "odd": ops.ChunkLayout.released(201, 30),
    "two tiles": ops.ChunkLayout.paper(288, 32),
    "plain": None,
}


def attend(example: Example, dtype: torch.dtype, **changes: Any) -> None:
    """Output and lse by the fp64 rule, with poisoned outputs and inputs surrounded by NaN."""
    q, k, v, _ = example.inputs(dtype)
    plain, exact = (definition(example, *(each.to(wide) for each in (q, k, v))) for wide in (dtype, torch.float64))
    with ops.use_backend("cuda"), poisoned_outputs():
        given = [surrounded(each) for each in (q, k, v)]
        output, lse = ops.dual_chunk_attention(*given, **{**example.options(dtype), **changes})
    if not output.numel():
        return
    assert_close_to_fp64(output, plain[0], exact[0], name="output")
    meets_keys = exact[1].isfinite()
    assert torch.equal(lse.isfinite(), meets_keys)
    assert lse.dtype == torch.float32
    # Sums are fp32, of logits of heads that are rounded to dtype.
    assert_close_to_fp64(lse[meets_keys].to(dtype), plain[1][meets_keys].to(dtype), exact[1][meets_keys], name="lse")
    assert (output.movedim(-2, 1 if output.dim() == 4 else 0)[~meets_keys] == 0).all()


@pytest.mark.parametrize(
    ("name", "length", "size", "dtype"),
    [
        ("short", 41, 64, BF16),
        ("wide window", 17, 128, FP16),
        ("no window", 149, 64, FP16),
        ("one tile", 401, 128, BF16),
        ("odd", 523, 64, BF16),
        ("two tiles", 773, 64, FP16),
        ("two tiles", 600, 128, BF16),
        ("plain", 257, 128, FP16),
    ],
)
def test_segments(emulation: Emulation, name: str, length: int, size: int, dtype: torch.dtype) -> None:
    example = Example(lengths=(length,), heads=(2, 1), size=size, chunks=LAYOUTS[name], batch=1)
    attend(dataclasses.replace(example, with_temperature=True), dtype)
    assert emulation.calls == LAUNCHES


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129])
def test_lengths_around_a_tile(emulation: Emulation, length: int) -> None:
    for name, size in (("odd", 64), ("plain", 128)):
        emulation.calls.clear()
        attend(Example(lengths=(length,), heads=(1, 1), size=size, chunks=LAYOUTS[name], batch=1), BF16)
        assert emulation.calls == (LAUNCHES if length else [])


@pytest.mark.parametrize("bounds", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["one tile", "plain"])
def test_packed_sequences(emulation: Emulation, name: str, bounds: torch.dtype) -> None:
    """Empty ones, few new rows, more queries than keys, ends and beginnings inside of a tile."""
    example = Example(
        lengths=(5, 0, 290, 3, 131),
        new_rows=(5, 0, 6, 5, 131),
        heads=(2, 1),
        size=64,
        chunks=LAYOUTS[name],
        with_temperature=True,
    )
    cumulated = {key: value.to(bounds) for key, value in example.options(BF16).items() if key.startswith("cu_")}
    attend(example, BF16, **cumulated)


@pytest.mark.parametrize(("heads", "batch"), [((6, 2), 1), ((3, 3), 2)])
def test_groups_of_heads_and_batches_behind_a_prefix(emulation: Emulation, heads: tuple[int, int], batch: int) -> None:
    example = Example(lengths=(211,), new_rows=(70,), heads=heads, size=64, chunks=LAYOUTS["one tile"], batch=batch)
    attend(example, BF16)


def test_keys_and_queries_that_come_rotated(emulation: Emulation) -> None:
    example = Example(lengths=(140,), heads=(2, 1), size=64, chunks=LAYOUTS["one tile"], keys_rotated=True, batch=1)
    attend(example, BF16)
    assert emulation.calls == ["attention_forward"]
    q, k, v, _ = (each.double() for each in example.inputs(BF16))
    output, lse = ops.dual_chunk_attention(q, k, v, chunks=None, tables=None)
    with ops.use_backend("cuda"), poisoned_outputs():
        ours = ops.dual_chunk_attention(*(each.to(BF16) for each in (q, k, v)), chunks=None, tables=None)
    torch.testing.assert_close(ours[0].double(), output, rtol=0, atol=0.03)
    torch.testing.assert_close(ours[1].double(), lse, rtol=0, atol=0.02)


def test_parts_of_the_keys_at_foreign_strides(emulation: Emulation) -> None:
    """Keys in two parts, each with its own first position, merged; rows that see none of one; views of heads."""
    rows, columns, start, cut = 190, 350, 170, 233
    wide = [random((4, 2, each, 64), BF16, seed=seed) for seed, each in enumerate((rows, columns, columns))]
    q, k, v = wide[0][1:3].transpose(1, 2), wide[1].transpose(1, 2)[2:, :, :1], wide[2].transpose(1, 2)[:2, :, 1:]
    tables = Example(lengths=(1,), size=64, chunks=LAYOUTS["odd"]).options(BF16)["tables"]
    common: dict[str, Any] = {"chunks": LAYOUTS["odd"], "query_start": start}
    exact = ops.dual_chunk_attention(
        *(each.double() for each in (q, k, v)), tables=tuple(each.double() for each in tables), **common
    )
    with ops.use_backend("cuda"), poisoned_outputs():
        parts = [
            ops.dual_chunk_attention(q, k[:, part], v[:, part], key_start=part.start, tables=tables, **common)
            for part in (slice(0, cut), slice(cut, columns))
        ]
    assert parts[1][1].isneginf().any()
    output, lse = ops.merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(output.double(), exact[0], rtol=0, atol=0.03)
    torch.testing.assert_close(lse.double(), exact[1], rtol=0, atol=0.02)


def test_no_sequence_gets_into_anothers_results(emulation: Emulation) -> None:
    """Blocks of keys go on where a sequence ends: here the next one is NaN."""
    example = Example(lengths=(70, 150, 60), heads=(1, 1), size=64, chunks=LAYOUTS["one tile"])
    inputs = example.inputs(BF16)[:3]
    for each in inputs:
        each[70:220] = float("nan")
    with ops.use_backend("cuda"):
        output, lse = ops.dual_chunk_attention(*inputs, **example.options(BF16))
    assert [bool(part.isfinite().all()) for part in output.split(example.lengths)] == [True, False, True]
    assert [bool(part.isfinite().all()) for part in lse.split(example.lengths, 1)] == [True, False, True]


def test_the_same_bits_for_any_number_of_blocks(emulation: Emulation) -> None:
    example = Example(lengths=(300,), heads=(3, 1), size=64, chunks=LAYOUTS["one tile"], batch=1)
    found = []
    for multiprocessors in (1, 2, 64):
        emulation.set_multiprocessors(multiprocessors)
        with ops.use_backend("cuda"):
            found.append(ops.dual_chunk_attention(*example.inputs(BF16)[:3], **example.options(BF16)))
    emulation.set_multiprocessors(2)
    assert all(torch.equal(ours, first) for each in found[1:] for ours, first in zip(each, found[0], strict=True))


@pytest.mark.parametrize("size", [64, 128])
def test_the_same_bits_in_another_order_of_events(emulation: Emulation, size: int) -> None:
    """A copy that lands at once overwrites what was given back too early; a thread that runs first meets
    what was not awaited."""
    example = Example(lengths=(750,), new_rows=(128,), heads=(1, 1), size=size, chunks=LAYOUTS["two tiles"], batch=1)
    with ops.use_backend("cuda"):
        late = ops.dual_chunk_attention(*example.inputs(BF16)[:3], **example.options(BF16))
        with emulation.other_order():
            early = ops.dual_chunk_attention(*example.inputs(BF16)[:3], **example.options(BF16))
    assert all(torch.equal(ours, others) for ours, others in zip(early, late, strict=True))


def refusal(*heads: torch.Tensor) -> str:
    with ops.use_backend("cuda"), pytest.raises(ConfigError) as error:
        ops.dual_chunk_attention(*heads, chunks=None, tables=None)
    return str(error.value)


def test_what_does_not_fit_is_refused_with_the_reason(emulation: Emulation) -> None:
    q = random((1, 5, 2, 64), BF16, seed=0)
    single = q.float()
    assert "takes bfloat16 and float16, not torch.float32" in refusal(single, single, single)
    narrow = random((1, 5, 2, 32), BF16, seed=0)
    assert "heads have 32 numbers, and kernels take 64 or 128" in refusal(narrow, narrow, narrow)
    shifted = torch.cat([q.flatten()[:1], q.flatten()])[1:].view_as(q)
    assert "start at multiples of 16 bytes, and k does not" in refusal(q, shifted, q)
    odd = random((1, 5, 2, 68), BF16, seed=0)[..., :64]
    assert "strides of multiples of 8 numbers, and v has (680, 136, 68, 1)" in refusal(q, q, odd)
    assert "and v has (640, 128, 0, 1)" in refusal(q, q, q[:, :, :1].expand_as(q))
    assert not emulation.calls


def test_the_extension_checks_sizes_itself(emulation: Emulation) -> None:
    assert emulation.module.attention_tile_rows == 128
    problem = ((1, 5, 5, 2, 2, 64), (2**29, 0, 0, 0, True), (0, 0, 0, 0, 0), (0, 1, 0, 2**22), (0, 0, 0), 1.0, 0)
    heads = (64, 0, 128, 64)
    pointers = {"out": 64, "lse": 64, "dtype": "bfloat16"}

    def message(given: tuple[Any, ...] = problem, **changes: Any) -> str:
        arguments = {"q": heads, "k": heads, "v": heads, **pointers, **changes}
        with pytest.raises(ValueError, match="attention_forward: ") as error:
            emulation.module.attention_forward(problem=given, **arguments)
        return str(error.value)

    assert "head_dim = 32; expected 64 or 128" in message(((1, 5, 5, 2, 2, 32), *problem[1:]))
    assert "heads_k = 3; expected a divisor of heads_q = 2" in message(((1, 5, 5, 2, 3, 64), *problem[1:]))
    assert "scale = -1.000000; expected a positive number" in message((*problem[:5], -1.0, 0))
    assert "stride of v = 4; expected a multiple of 8 elements" in message(v=(64, 0, 128, 4))
    assert "k = 0x8 is not a multiple of 16 bytes" in message(k=(8, 0, 128, 64))
    assert "dtype is float32; expected bfloat16 or float16" in message(dtype="float32")
    assert cuda_limits.MOST_ROWS == 2**29
    assert "rows_q = 536870913; expected at most 536870912" in message(((1, 2**29 + 1, 5, 2, 2, 64), *problem[1:]))
