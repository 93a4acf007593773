"""Parts of queries and keys: chunked prefill, context parallelism, and the pieces that a CPU computes."""

from __future__ import annotations

import itertools
from typing import Any

import dual_chunk_checks as checks
import pytest
import torch
from dual_chunk_checks import Example

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.dual_chunk_attention import layout, pieces
from megatron_qwen.kernels.dual_chunk_attention.segments import runs
from megatron_qwen.testing.compare import assert_relative

LAYOUTS = [ops.ChunkLayout.released(8, 3), ops.ChunkLayout.paper(8, 3), ops.ChunkLayout.released(4, 3), None]
LENGTH = 29


@pytest.mark.parametrize("longest", [3, 1000])
@pytest.mark.parametrize("chunks", [*LAYOUTS, ops.ChunkLayout.released(8, 6)])
def test_pieces_hold_every_visible_pair_once(chunks: ops.ChunkLayout | None, longest: int) -> None:
    for query_start, rows, key_start, columns in itertools.product((-3, 0, 4, 11), (0, 1, 9), (0, 2, 7, 16), (0, 1, 9)):
        seen: dict[tuple[int, int], int] = {}
        for run in runs(chunks, query_start, rows, key_start, columns, longest):
            assert 0 < run.last_row - run.first_row <= longest
            for piece in run.pieces:
                assert 0 <= piece.first_key < piece.last_key <= columns
                keys = range(piece.first_key, piece.last_key)
                for i, j in itertools.product(range(run.first_row, run.last_row), keys):
                    if not piece.is_causal or j - piece.first_key <= i - run.first_row:
                        assert seen.setdefault((i, j), piece.variant) == piece.variant
                        seen[i, j] += 10
        stride = 10**6 if chunks is None else chunks.stride
        expected = {
            (i, j): 10 + min((i + query_start) // stride - (j + key_start) // stride, 2)
            for i, j in itertools.product(range(rows), range(columns))
            if j + key_start <= i + query_start
        }
        assert seen == expected


@pytest.mark.parametrize("heads", [1, 3])
def test_a_single_causal_row_sees_the_first_key(heads: int) -> None:
    q, k, v = (torch.randn(2, rows, count, 8) for rows, count in ((1, heads), (3, 1), (3, 1)))
    output, lse = pieces.attend(q, k, v, 0.5, True)
    torch.testing.assert_close(output, v[:, :1].expand(2, 1, heads, 8))
    torch.testing.assert_close(lse, 0.5 * torch.einsum("bshd,bsgd->bhs", q, k[:, :1]))


def whole(chunks: ops.ChunkLayout | None, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    example = Example(lengths=(LENGTH,), batch=2, chunks=chunks, with_temperature=True)
    return example.inputs(dtype), example.options(dtype)


@pytest.mark.parametrize("size", [1, 4, 5, 7])
@pytest.mark.parametrize("chunks", LAYOUTS)
def test_chunked_prefill_equals_one_shot(chunks: ops.ChunkLayout | None, size: int) -> None:
    """By parts of `size` tokens; with size 1 that is decoding. Keys rotated before or by the operation."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        (q, k, v, _), options = whole(chunks, dtype)
        expected, lse = ops.dual_chunk_attention(q, k, v, **options)
        at = torch.arange(LENGTH) if chunks is None else layout.key_positions(chunks, torch.arange(LENGTH))
        cached = torch.stack([checks.rotated(each, options["tables"], at) for each in k])
        for keys, is_rotated in ((k, False), (cached, True)):
            parts = []
            for start in range(0, LENGTH, size):
                end = min(start + size, LENGTH)
                part = {**options, "logit_scale": options["logit_scale"][start:end], "keys_rotated": is_rotated}
                parts.append(ops.dual_chunk_attention(q[:, start:end], keys[:, :end], v[:, :end], **part))
            assert_relative(torch.cat([out for out, _ in parts], 1), expected, tolerance)
            assert_relative(torch.cat([each for _, each in parts], 2), lse, tolerance)


@pytest.mark.parametrize("chunks", LAYOUTS)
def test_parts_of_the_keys_merge_to_the_whole_with_exact_gradients(chunks: ops.ChunkLayout | None) -> None:
    """As ring context parallelism does it: each part's attention, merged; backward of each with the merged lse."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 3e-2)):
        (q, k, v, grad), options = whole(chunks, dtype)
        leaves = [each.requires_grad_() for each in (q, k, v)]
        output, _ = ops.dual_chunk_attention(*leaves, **options)
        grads = torch.autograd.grad(output, leaves, grad)
        bounds = [0, 3, 10, 11, 24, LENGTH]
        for rows in (slice(0, LENGTH), slice(8, 17)):
            of_rows = {**options, "logit_scale": options["logit_scale"][rows], "query_start": rows.start}
            parts = [(slice(*span), {**of_rows, "key_start": span[0]}) for span in itertools.pairwise(bounds)]
            forward = [ops.dual_chunk_attention(q[:, rows], k[:, x], v[:, x], **given) for x, given in parts]
            merged, lse = ops.merge_attention([out for out, _ in forward], [each for _, each in forward])
            assert merged.dtype == dtype
            assert_relative(merged, output[:, rows], tolerance)
            backward = [
                ops.dual_chunk_attention_backward(grad[:, rows], q[:, rows], k[:, x], v[:, x], merged, lse, **given)
                for x, given in parts
            ]
            assert_relative(sum(each[0] for each in backward), grads[0][:, rows], tolerance)
            if rows.start == 0:
                for index in (1, 2):
                    assert_relative(torch.cat([each[index] for each in backward], 1), grads[index], tolerance)


def test_keys_behind_every_query_are_nothing() -> None:
    (q, k, v, grad), options = whole(LAYOUTS[0], torch.float32)
    output, lse = ops.dual_chunk_attention(q, k, v, **options, query_start=0, key_start=LENGTH)
    assert (output == 0).all()
    assert (lse == -torch.inf).all()
    merged, of_rows = ops.merge_attention([output, output], [lse, lse])
    assert (merged == 0).all()
    assert (of_rows == -torch.inf).all()
    grads = ops.dual_chunk_attention_backward(grad, q, k, v, output, lse, **options, query_start=0, key_start=LENGTH)
    assert all((each == 0).all() for each in grads)


def test_merge_of_packed_parts_and_of_large_differences() -> None:
    outputs = [torch.full((3, 2, 4), float(i + 1)) for i in range(3)]
    lses = [torch.tensor([[0.0, 500.0, -torch.inf]] * 2), torch.zeros(2, 3), torch.tensor([[0.0, 400.0, -1e4]] * 2)]
    output, lse = ops.merge_attention(outputs, lses)
    torch.testing.assert_close(output[:, 0, 0], torch.tensor([2.0, 1.0, 2.0]))
    torch.testing.assert_close(lse[0], torch.tensor([0.0, 500.0, 0.0]) + torch.tensor([3.0, 1.0, 1.0]).log())


@pytest.mark.parametrize(
    ("outputs", "lses"),
    [
        ([], []),
        ([torch.zeros(3, 2, 4)], []),
        ([torch.zeros(3, 2, 4)], [torch.zeros(3, 2)]),
        ([torch.zeros(3, 2, 4), torch.zeros(3, 1, 4)], [torch.zeros(2, 3)] * 2),
    ],
)
def test_a_merge_of_what_does_not_fit(outputs: list[torch.Tensor], lses: list[torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ops.merge_attention(outputs, lses)


@pytest.mark.parametrize("name", ["grad", "output", "lse"])
def test_backward_of_what_does_not_fit(name: str) -> None:
    (q, k, v, grad), options = whole(LAYOUTS[0], torch.float32)
    given = {"grad": grad, "output": grad, "lse": torch.zeros(2, 4, LENGTH)}
    for bad in (given[name][:, :1], given[name].double()):
        with pytest.raises(ConfigError, match=f"{name} has"):
            ops.dual_chunk_attention_backward(q=q, k=k, v=v, **{**given, name: bad}, **options)


def test_the_gradient_by_itself_has_none() -> None:
    (q, k, v, grad), options = whole(LAYOUTS[0], torch.float32)
    output, lse = ops.dual_chunk_attention(q, k, v, **options)
    grads = ops.dual_chunk_attention_backward(grad, q.requires_grad_(), k, v, output, lse, **options)
    with pytest.raises(RuntimeError, match="has no gradient"):
        grads[1].sum().backward()


def test_compiled_parts_have_one_graph() -> None:
    """Of the gradient by itself, as context parallelism calls it from its own autograd function."""
    (q, k, v, grad), options = whole(LAYOUTS[0], torch.float32)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> Any:
        output, lse = ops.dual_chunk_attention(q, k, v, **options)
        merged, lse = ops.merge_attention([output, output], [lse, lse])
        return ops.dual_chunk_attention_backward(grad, q, k, v, merged, lse, **options)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(q, k, v, grad)
    torch.testing.assert_close(compiled, step(q, k, v, grad))
