"""`dual_chunk_attention` on a CPU, piece by piece, against its definition."""

from __future__ import annotations

from typing import Any

import dual_chunk_checks as checks
import op_checks
import pytest
import torch
from dual_chunk_checks import Example

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.dual_chunk_attention import blockwise, pieces, reference
from megatron_qwen.kernels.dual_chunk_attention.arguments import unfit
from megatron_qwen.testing.compare import assert_relative

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "released": ops.ChunkLayout.released(8, 3),
    "paper": ops.ChunkLayout.paper(8, 3),
    "no window": ops.ChunkLayout.released(5, 0),
    "window longer than a chunk": ops.ChunkLayout.released(8, 5),
    "chunks of one": ops.ChunkLayout.released(4, 3),
    "plain": None,
}


@pytest.mark.parametrize("chunks", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, 13, 23])
def test_the_definition_is_the_one_pair_by_pair(length: int, chunks: ops.ChunkLayout | None) -> None:
    """Written twice: with matrices of positions, and for each pair of a row and a key."""
    example = Example(lengths=(length,), heads=(4, 2), size=7, chunks=chunks, with_temperature=True)
    *inputs, grad = example.inputs(torch.float64)
    options = example.options(torch.float64)

    def by_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return checks.plain(q, k, v, chunks, options["tables"], logit_scale=options["logit_scale"])[0]

    found = op_checks.results(lambda *heads: checks.definition(example, *heads)[0], inputs, [grad])
    for mine, expected in zip(found, op_checks.results(by_pairs, inputs, [grad]), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    lse = checks.plain(*inputs, chunks, options["tables"], logit_scale=options["logit_scale"])[1]
    torch.testing.assert_close(checks.definition(example, *inputs)[1], lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_temperature", [False, True])
@pytest.mark.parametrize("chunks", LAYOUTS.values(), ids=LAYOUTS)
def test_every_length_as_exact_as_plain_torch(
    chunks: ops.ChunkLayout | None, with_temperature: bool, dtype: torch.dtype
) -> None:
    for length in (0, 2, 4, 5, 6, 7, 11, 13, 31, 41):
        # The largest error of few numbers is a matter of luck, in plain torch too.
        batch = 5 if length < 8 else 2
        example = Example(lengths=(length,), batch=batch, chunks=chunks, with_temperature=with_temperature)
        checks.check(example, dtype, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(14, 2), (28, 4), (40, 8), (64, 8), (3, 3)])
def test_heads_of_all_sizes(heads: tuple[int, int], dtype: torch.dtype) -> None:
    checks.check(Example(lengths=(23,), heads=heads, size=6, batch=1, with_temperature=True), dtype, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 64, 128])
def test_head_sizes(size: int, dtype: torch.dtype) -> None:
    rotated = Example(lengths=(19,), size=size, batch=1)
    if size == 1:  # nothing to rotate: tables are of pairs
        *inputs, _ = rotated.inputs(dtype)
        output, _ = ops.dual_chunk_attention(*inputs, chunks=None, tables=None)
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(each.double().transpose(1, 2) for each in inputs), is_causal=True, enable_gqa=True
        )
        assert_relative(output, exact.transpose(1, 2), 2 * torch.finfo(dtype).eps)
        return
    checks.check(rotated, dtype, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys_rotated", [False, True])
@pytest.mark.parametrize("chunks", [LAYOUTS["released"], None])
def test_packed_sequences(chunks: ops.ChunkLayout | None, keys_rotated: bool, dtype: torch.dtype) -> None:
    for lengths in [(0,), (0, 7, 0), (5, 0, 6, 16), (1, 23, 2)]:
        example = Example(lengths=lengths, chunks=chunks, keys_rotated=keys_rotated, with_temperature=True)
        checks.check(example, dtype, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_sequences_with_few_new_rows(dtype: torch.dtype) -> None:
    """Chunked prefill of several sequences; the last has more queries than keys, whose first rows see nothing."""
    example = Example(lengths=(23, 5, 9, 4), new_rows=(4, 0, 9, 6))
    checks.check(example, dtype, "reference")
    *inputs, grad = example.inputs(dtype)
    leaves = [each.requires_grad_() for each in inputs]
    output, lse = ops.dual_chunk_attention(*leaves, **example.options(dtype))
    assert (output[13:15] == 0).all()
    assert (lse[:, 13:15] == -torch.inf).all()
    (of_q,) = torch.autograd.grad(output, leaves[:1], grad)
    assert (of_q[13:15] == 0).all()


def test_a_row_with_one_key_has_no_gradient_of_its_query() -> None:
    *inputs, grad = Example(lengths=(1,), batch=2).inputs(torch.float32)
    options = Example(lengths=(1,), batch=2).options(torch.float32)
    output, *grads = op_checks.results(lambda *qkv: ops.dual_chunk_attention(*qkv, **options)[0], inputs, [grad])
    torch.testing.assert_close(output, inputs[2].repeat_interleave(2, 2))
    torch.testing.assert_close(grads[2], grad.unflatten(2, (2, 2)).sum(3))
    assert all(each.abs().max() < 1e-6 for each in grads[:2])


def test_runs_shorter_than_a_chunk_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest run of rows bounds the memory; here it is 3 rows, so that a chunk has two."""
    monkeypatch.setattr(blockwise, "LONGEST_RUN", 3)
    for chunks in (LAYOUTS["released"], None):
        for dtype in DTYPES:
            checks.check(Example(lengths=(31,), batch=2, chunks=chunks, with_temperature=True), dtype, "reference")


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_by_matrix_products(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """What devices other than a CPU take where no kernel runs; tiles of 4 rows."""
    monkeypatch.setattr(pieces, "_attend_on_cpu", pieces._attend_by_products)
    monkeypatch.setattr(pieces, "_backward_on_cpu", pieces._backward_by_products)
    monkeypatch.setattr(pieces, "TILE", 4)
    checks.check(Example(lengths=(23, 0, 2), with_temperature=True), dtype, "reference")
    checks.check(Example(lengths=(23,), batch=2, chunks=None), dtype, "reference")


def test_equals_plain_causal_attention_up_to_a_chunk() -> None:
    chunks = LAYOUTS["released"]
    example = Example(lengths=(chunks.stride,), batch=2)
    *inputs, grad = example.inputs(torch.float32)
    options = example.options(torch.float32)
    found = [
        op_checks.results(
            lambda *qkv, layout=layout: ops.dual_chunk_attention(*qkv, **{**options, "chunks": layout})[0],
            inputs,
            [grad],
        )
        for layout in (chunks, None)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    longer = Example(lengths=(chunks.stride + 1,), batch=2)
    outputs = [
        ops.dual_chunk_attention(*longer.inputs(torch.float64)[:3], **{**longer.options(torch.float64), "chunks": each})
        for each in (chunks, None)
    ]
    # The first row of the second chunk is within the window: true distances still.
    torch.testing.assert_close(*(each[0] for each in outputs))


def test_the_cap_makes_a_difference() -> None:
    example = Example(lengths=(23,), batch=1)
    *inputs, _ = example.inputs(torch.float64)
    outputs = [
        ops.dual_chunk_attention(*inputs, **{**example.options(torch.float64), "chunks": LAYOUTS[name]})[0]
        for name in ("released", "paper")
    ]
    assert torch.equal(outputs[0][:, :5], outputs[1][:, :5])
    assert (outputs[0][:, 10:] - outputs[1][:, 10:]).abs().max() > 1e-3


def test_heads_that_are_split_off_a_wider_tensor() -> None:
    """q, k and v as views of one packed projection [S, B, W], and the batch axis second."""
    example = Example(lengths=(23,), batch=2)
    *inputs, grad = example.inputs(torch.bfloat16)
    options = example.options(torch.bfloat16)
    packed = torch.cat(inputs, 2).transpose(0, 1).contiguous()
    views = [each.transpose(0, 1) for each in packed.split([4, 2, 2], 2)]
    assert not any(each.is_contiguous() for each in views)
    run = [op_checks.results(lambda *a: ops.dual_chunk_attention(*a, **options)[0], x, [grad]) for x in (inputs, views)]
    assert all(torch.equal(a, b) for a, b in zip(*run, strict=True))
    assert run[1][0].is_contiguous()


def test_gradient_of_a_sum_and_a_gradient_with_strides() -> None:
    example = Example(lengths=(13,), batch=2)
    leaves = [each.requires_grad_() for each in example.inputs(torch.float32)[:3]]
    output, lse = ops.dual_chunk_attention(*leaves, **example.options(torch.float32))
    assert not lse.requires_grad
    by_sum = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    by_ones = torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)
    strided = torch.ones(2, 4, 13, 8).transpose(1, 2)
    by_view = torch.autograd.grad(output, leaves, strided)
    for each in zip(by_sum, by_ones, by_view, strict=True):
        assert torch.equal(each[0], each[1])
        assert torch.equal(each[0], each[2])


def test_same_bits_again() -> None:
    example = Example(lengths=(41,), batch=2, with_temperature=True)
    *inputs, grad = example.inputs(torch.bfloat16)
    options = example.options(torch.bfloat16)
    runs = [op_checks.results(lambda *a: ops.dual_chunk_attention(*a, **options)[0], inputs, [grad]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_empty_batch() -> None:
    inputs = [torch.zeros(0, 5, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    output, lse = ops.dual_chunk_attention(*inputs, chunks=LAYOUTS["released"], tables=checks.tables(9, torch.float32))
    output.sum().backward()
    assert (output.shape, lse.shape, inputs[1].grad.shape) == ((0, 5, 4, 8), (0, 4, 5), (0, 5, 2, 8))


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor that is made, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if torch.is_tensor(each):
                self.largest = max(self.largest, each.untyped_storage().nbytes() // each.element_size())
        return out


def peak_bytes(length: int) -> int:
    """Of forward and backward together, by torch's own account of what is allocated."""
    example = Example(lengths=(length,), batch=1, heads=(2, 1), size=16, chunks=ops.ChunkLayout.released(64, 16))
    leaves = [each.requires_grad_() for each in example.inputs(torch.float32)[:3]]
    options = example.options(torch.float32)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output, _ = ops.dual_chunk_attention(*leaves, **options)
        output.backward(torch.ones_like(output))
    total, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    short, long = peak_bytes(512), peak_bytes(2048)
    assert 3.0 < long / short < 4.5, (short, long)
    example = Example(lengths=(2048,), batch=1, heads=(2, 1), size=16, chunks=ops.ChunkLayout.released(64, 16))
    with Allocations() as made:
        ops.dual_chunk_attention(*example.inputs(torch.float32)[:3], **example.options(torch.float32))
    assert made.largest <= 2048 * 2 * 16


BAD = {
    "k has shape": {"k": torch.zeros(1, 6, 3, 8)},
    "v has shape": {"v": torch.zeros(1, 5, 2, 8)},
    "q has strides": {"q": torch.zeros(1, 6, 8, 4).transpose(2, 3)},
    "tables is None": {"tables": None},
    "tables have 8 positions": {"tables": checks.tables(8, torch.float32)},
    "tables have 5 positions": {"chunks": None, "tables": checks.tables(5, torch.float32)},
    "key_start is -1": {"key_start": -1},
    "logit_scale has shape": {"logit_scale": torch.ones(5)},
    "logit_scale has dtype": {"logit_scale": torch.ones(6, dtype=torch.bfloat16)},
    "softmax_scale is inf": {"softmax_scale": float("inf")},
    "cu_seqlens_q and cu_seqlens_k are": {"cu_seqlens_q": torch.tensor([0, 6])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str) -> None:
    *inputs, _ = Example(lengths=(6,), batch=1).inputs(torch.float32)
    options = Example(lengths=(6,), batch=1).options(torch.float32)
    given = {**dict(zip(("q", "k", "v"), inputs, strict=True)), **options, **BAD[message]}
    with pytest.raises(ConfigError, match=message):
        ops.dual_chunk_attention(**given)


@pytest.mark.parametrize("bounds", [[1, 6], [0, 5], [0, 4, 2, 6]])
def test_bad_boundaries(bounds: list[int]) -> None:
    *inputs, _ = Example(lengths=(6,)).inputs(torch.float32)
    options = {**Example(lengths=(6,)).options(torch.float32)}
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        valid = torch.tensor([0] * (len(bounds) - 1) + [6])
        given = {**options, "cu_seqlens_q": valid, "cu_seqlens_k": valid, name: torch.tensor(bounds)}
        with pytest.raises(ConfigError, match=f"{name} is .*expected ascending"):
            ops.dual_chunk_attention(*inputs, **given)
    with pytest.raises(ConfigError, match="query_start is 3"):
        ops.dual_chunk_attention(*inputs, **options, query_start=3)


@pytest.mark.parametrize(("size", "window", "cap"), [(8, 8, None), (8, -1, None), (0, 0, None), (8, 3, 9), (8, 3, 6)])
def test_bad_layouts(size: int, window: int, cap: int | None) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ops.ChunkLayout(size, window, cap)


def test_layout_sizes() -> None:
    for size, window, cap in [(8, 3, 8), (8, 3, 7), (8, 5, 8), (8, 5, 7), (5, 0, 5), (1, 0, 1)]:
        chunks = ops.ChunkLayout(size, window, cap)
        _, succ, inter = reference.layout.query_positions(chunks, torch.arange(chunks.stride))
        assert int((succ != inter).sum()) == chunks.alike_from
        assert int(torch.stack([succ.max(), inter.max()]).max()) == chunks.inter_position


def test_rows_too_far_apart_for_kernels_are_named() -> None:
    near = torch.empty(2, 1, 64)
    far = torch.empty(64).as_strided((1, 1, 64), (2**24 + 1, 64, 1))
    assert not unfit(near, None, 1.0, near)
    assert "rows are 16777217 numbers apart" in unfit(near, None, 1.0, far)
