"""Checks of sparse prefill for kernels, at sizes of heads that they take; see sparse_checks.py.

Shapes: S, K tokens of q and k, H, G heads of queries and keys, D head size.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import dual_chunk_checks
import op_checks
import torch

from megatron_qwen import ops
from megatron_qwen.kernels.sparse_attention.index import intervals
from megatron_qwen.testing.compare import assert_close_to_fp64, compare
from megatron_qwen.testing.poison import poisoned_outputs

SIZE = 64
Lists = list[tuple[set[int], set[int]]]


def inputs(rows: int, length: int, heads: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    shapes = (rows, heads[0]), (length, heads[1]), (length, heads[1])
    return [op_checks.random((*shape, SIZE), dtype, seed=seed, scale=1.5) for seed, shape in enumerate(shapes)]


def options(chunks: ops.ChunkLayout | None, rows: int, length: int, dtype: torch.dtype) -> dict[str, Any]:
    wide = torch.promote_types(dtype, torch.float32)
    positions = length if chunks is None else chunks.inter_position + 1
    return {
        "chunks": chunks,
        "tables": dual_chunk_checks.tables(positions, dtype, SIZE),
        "logit_scale": torch.linspace(1.0, 1.4, rows).to(wide),
    }


def index_of(lists: Lists, length: int) -> ops.SparseIndex:
    columns, slashes = zip(*lists, strict=True)
    return ops.SparseIndex.of_heads(
        length,
        [torch.tensor(sorted(each), dtype=torch.int64) for each in columns],
        [intervals(torch.tensor(sorted(each), dtype=torch.int64), length) for each in slashes],
    )


def check(
    chunks: ops.ChunkLayout | None,
    rows: int,
    length: int,
    lists: Lists,
    dtype: torch.dtype,
    backend: str,
    groups: int = 1,
) -> None:
    """Against the definition in fp64 by the rule; 0 and -inf for rows without a kept key; nothing else is read."""
    heads = inputs(rows, length, (len(lists), groups), dtype)
    index = index_of(lists, length)

    def run(wide: torch.dtype, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        with ops.use_backend(backend), poisoned_outputs():
            given = options(chunks, rows, length, wide)
            return ops.sparse_prefill_attention(*(each.to(wide) for each in heads), index, **given)

    plain, exact, ours = run(dtype, "reference"), run(torch.float64, "reference"), run(dtype, backend)
    assert_close_to_fp64(ours[0], plain[0], exact[0])
    is_empty = exact[1] == -torch.inf
    assert torch.equal(ours[1] == -torch.inf, is_empty)
    assert bool((ours[0].transpose(0, 1)[is_empty] == 0).all())
    found, expected = (each.masked_fill(is_empty, 0.0) for each in (ours[1], exact[1]))
    error = compare(plain[1].masked_fill(is_empty, 0.0), expected, 0.0).error
    assert compare(found, expected, 2.0 * error + 1e-5).ok


def check_full(chunks: ops.ChunkLayout | None, rows: int, length: int, backend: str) -> None:
    """All pairs by distances, by columns, and by both give what dense attention gives."""
    q, k, v = inputs(rows, length, (2, 1), torch.float32)
    given = options(chunks, rows, length, torch.float32)
    with ops.use_backend("reference"):
        dense, dense_lse = (each[0] for each in ops.dual_chunk_attention(q[None], k[None], v[None], **given))
    everything = set(range(length))
    for lists in ([(set(), everything), (everything, set())], [(everything, {3, 9, *range(20, length, 7)})] * 2):
        with ops.use_backend(backend):
            output, lse = ops.sparse_prefill_attention(q, k, v, index_of(lists, length), **given)
        torch.testing.assert_close(output, dense, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, dense_lse, rtol=1e-5, atol=1e-5)


def check_views_and_rotated_keys(chunks: ops.ChunkLayout, backend: str) -> None:
    """Heads at foreign strides, keys as a cache holds them."""
    rows, length = 9, 31
    q, k, v = inputs(rows, length, (4, 4), torch.float32)
    q, k, v = q[:, 1:3], k[:, 2:3], v[:, :1]
    given = options(chunks, rows, length, torch.float32)
    cached = dual_chunk_checks.rotated(k, given["tables"], torch.arange(length) % chunks.stride)
    index = index_of([({0, 5, 17}, {0, 1, 2, 12}), ({30}, {7})], length)
    expected = ops.sparse_prefill_attention(q, k, v, index, **given)
    for keys, is_rotated in ((k, False), (cached, True)):
        with ops.use_backend(backend), poisoned_outputs():
            found = ops.sparse_prefill_attention(q, keys, v, index, keys_rotated=is_rotated, **given)
        for ours, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def check_no_host_read() -> None:
    """The launch of meta tensors, up to the kernels: reading a number of one raises."""
    from megatron_qwen.kernels.dual_chunk_attention import rotate_kernel
    from megatron_qwen.kernels.dual_chunk_attention.request import AttentionRequest
    from megatron_qwen.kernels.sparse_attention import bitmap_kernel, kernel

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    bounds, table = meta(5, dtype=torch.int64), meta(64, SIZE // 2)
    index = ops.SparseIndex(300, meta(40, dtype=torch.int32), bounds, meta(90, 2, dtype=torch.int32), bounds)
    request = AttentionRequest(
        chunks=ops.ChunkLayout.released(64, 16), tables=(table, table), keys_rotated=False, cu_seqlens=None,
        query_start=200, key_start=0, scale=0.125, logit_scale=meta(100), deterministic=True,
    )  # fmt: skip
    launches = {name: mock.MagicMock() for name in ("rotate_heads_kernel", "bitmap_kernel", "sparse_forward_kernel")}
    with (
        mock.patch.object(rotate_kernel, "rotate_heads_kernel", launches["rotate_heads_kernel"]),
        mock.patch.object(bitmap_kernel, "bitmap_kernel", launches["bitmap_kernel"]),
        mock.patch.object(kernel, "sparse_forward_kernel", launches["sparse_forward_kernel"]),
    ):
        kernel.launch_forward(meta(100, 4, SIZE), meta(300, 2, SIZE), meta(300, 2, SIZE), index, request)
    assert all(each.__getitem__.called for each in launches.values())
