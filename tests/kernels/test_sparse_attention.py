"""Sparse prefill: the index against a mask of pairs, attention against all logits at once, full against dense."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import sparse_checks as checks
import torch
from dual_chunk_checks import rotated

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.kernels.dual_chunk_attention import layout
from megatron_qwen.kernels.sparse_attention import attention, blocks
from megatron_qwen.kernels.sparse_attention.index import intervals
from megatron_qwen.testing.compare import assert_relative

LAYOUTS = [ops.ChunkLayout.released(8, 3), ops.ChunkLayout.paper(24, 5), ops.ChunkLayout.released(96, 7), None]
SIZES = [(1, 1), (5, 5), (1, 29), (29, 29), (9, 31), (70, 133)]
TOLERANCES = [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 3e-2)]


@pytest.mark.parametrize("seed", range(6))
def test_index_keeps_the_pairs_of_its_lists(seed: int) -> None:
    for length in (1, 7, 40):
        lists = checks.random_lists(length, seed)
        index = checks.index_of(lists, length)
        positions = torch.arange(length)
        kept = torch.stack([index.kept(head, positions, positions) for head in range(len(lists))])
        assert torch.equal(kept, checks.mask(lists, length, length))
        assert index.nbytes == 4 * len(index.verticals) + 8 * len(index.slashes) + 16 * (len(lists) + 1)


@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (4, 8), (8, 4), (1, 1), (128, 64)])
def test_blocks_hold_every_key_of_a_slash_once(rows: int, keys: int) -> None:
    """Relative to any tile: keys at x are x + r away from its rows r."""
    for seed, length in itertools.product(range(6), (1, 7, 40, 133)):
        lists = checks.random_lists(length, seed)
        found = blocks.tile_blocks(checks.index_of(lists, length), rows, keys)
        assert found.starts.shape == (len(lists), 2, blocks.slots(length, rows, keys))
        for of_head, counts, (_, distances) in zip(found.starts, found.counts, lists, strict=True):
            whole, partial = (each[:count].tolist() for each, count in zip(of_head, counts, strict=True))
            assert [whole, partial] == [sorted(whole), sorted(partial)]
            needed = {distance - row for distance in distances for row in range(rows)}
            covered = [x + key for x in whole + partial for key in range(keys)]
            assert len(covered) == len(set(covered))
            assert needed <= set(covered)
            for x in whole + partial:
                assert needed & set(range(x, x + keys))
                assert (x in whole) == (set(range(x, x + keys + rows - 1)) <= distances)


@pytest.mark.parametrize("seed", range(6))
def test_columns_of_a_tile_hold_every_kept_pair_once(seed: int) -> None:
    length = 40
    lists = checks.random_lists(length, seed)
    index, kept = checks.index_of(lists, length), checks.mask(lists, length, length)
    for head, first, rows in itertools.product(range(len(lists)), (0, 1, 13, 39), (1, 2, 8, 40)):
        last = min(first + rows, length)
        columns = attention.tile_columns(*(each.long() for each in index.of_head(head)), first, last)
        both = columns.whole.tolist() + columns.partial.tolist()
        assert len(both) == len(set(both))
        assert all(0 <= column < last for column in both)
        of_tile = kept[head, first:last]
        assert bool(of_tile[:, columns.whole].all())
        assert set(of_tile.any(0).nonzero().flatten().tolist()) <= set(both)


def test_intervals_merge_across_gaps() -> None:
    distances = torch.tensor([0, 1, 2, 5, 6, 9, 15])
    assert intervals(distances, 16).tolist() == [[0, 3], [5, 7], [9, 10], [15, 16]]
    assert intervals(distances, 16, 2).tolist() == [[0, 10], [15, 16]]
    assert intervals(distances[:0], 16).tolist() == []


def test_an_index_of_a_million_keys_takes_kilobytes() -> None:
    """28 heads with the 7B model's commonest budget, all diagonals by themselves; vLLM lists 2.7 GB for one chunk."""
    verticals = [torch.arange(1000) * 900] * 28
    slashes = [intervals(torch.arange(6096) * 160, 1_000_000)] * 28
    index = ops.SparseIndex.of_heads(1_000_000, verticals, slashes)
    assert index.nbytes == 28 * (4 * 1000 + 8 * 6096 + 16) + 16
    assert index.nbytes < 1_500_000


@pytest.mark.parametrize("chunks", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_attention_equals_all_logits_masked(
    chunks: ops.ChunkLayout | None, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64 the judge is the same computation; other dtypes are judged by fp64 too."""
    for number, (rows, length) in enumerate(SIZES):
        monkeypatch.setattr(attention, "MASKED_KEYS", 7 if number % 2 else 1000)
        lists = checks.random_lists(length, number)
        q, k, v = checks.inputs(rows, length, dtype)
        given = checks.options(chunks, rows, length, dtype)
        output, lse = ops.sparse_prefill_attention(q, k, v, checks.index_of(lists, length), **given)
        wide = {**given, "logit_scale": given["logit_scale"].double()}
        kept = checks.mask(lists, rows, length)
        expected, expected_lse = checks.masked(*(each.double() for each in (q, k, v)), kept, wide)
        is_seen = kept.any(-1)
        assert output.dtype == dtype
        assert bool((lse[~is_seen] == -torch.inf).all())
        assert bool((output.transpose(0, 1)[~is_seen] == 0).all())
        assert_relative(output, expected, tolerance)
        if is_seen.any():
            assert_relative(lse[is_seen], expected_lse[is_seen], tolerance)


@pytest.mark.parametrize("chunks", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_a_full_index_equals_dense(chunks: ops.ChunkLayout | None, dtype: torch.dtype, tolerance: float) -> None:
    for rows, length in [*SIZES, (0, 3), (200, 200)]:
        q, k, v = checks.inputs(rows, length, dtype)
        given = checks.options(chunks, rows, length, dtype)
        dense, dense_lse = (each[0] for each in ops.dual_chunk_attention(q[None], k[None], v[None], **given))
        all_columns = [torch.arange(length)] * checks.HEADS[0]
        none = [torch.zeros(0, 2, dtype=torch.int32)] * checks.HEADS[0]
        by_columns = ops.SparseIndex.of_heads(length, all_columns, none)
        for index in (ops.SparseIndex.full(length, checks.HEADS[0]), by_columns):
            output, lse = ops.sparse_prefill_attention(q, k, v, index, **given)
            assert output.shape == dense.shape
            if rows:
                assert_relative(output, dense, tolerance)
                assert_relative(lse, dense_lse, tolerance)


@pytest.mark.parametrize("near", [range(2), range(11, 13), range(0)])
def test_a_segment_without_kept_keys_counts_for_nothing(near: range) -> None:
    """Only the own chunk, only older chunks, nothing at all: no column stands in for those that were left out."""
    chunks, length = ops.ChunkLayout.released(8, 3), 29
    lists: checks.Lists = [(set(), set(near))] * checks.HEADS[0]
    q, k, v = checks.inputs(length, length, torch.float64)
    given = checks.options(chunks, length, length, torch.float64)
    output, lse = ops.sparse_prefill_attention(q, k, v, checks.index_of(lists, length), **given)
    expected, expected_lse = checks.masked(q, k, v, checks.mask(lists, length, length), given)
    assert_relative(output, expected, 1e-13)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("chunks", LAYOUTS)
def test_keys_as_a_cache_holds_them_and_any_strides(chunks: ops.ChunkLayout | None) -> None:
    rows, length = 9, 31
    q, k, v = checks.inputs(rows, length, torch.float32)
    given = checks.options(chunks, rows, length, torch.float32)
    index = checks.index_of(checks.random_lists(length, 3), length)
    expected, lse = ops.sparse_prefill_attention(q, k, v, index, **given)
    at = torch.arange(length) if chunks is None else layout.key_positions(chunks, torch.arange(length))
    cached = rotated(k, given["tables"], at)
    for keys, is_rotated in ((k.transpose(0, 1).contiguous().transpose(0, 1), False), (cached, True)):
        output, of_rows = ops.sparse_prefill_attention(q, keys, v, index, keys_rotated=is_rotated, **given)
        assert_relative(output, expected, 2e-6)
        torch.testing.assert_close(of_rows, lse)


def test_weights_of_all_parts_add_up_to_one() -> None:
    """Whatever the roundings of their lse, of 100 here: exp(lse_part - lse) made values of 1 wrong by 63 roundings."""
    rows, length = 70, 133
    q, k, v = checks.inputs(rows, length, torch.float32)
    given = checks.options(LAYOUTS[0], rows, length, torch.float32)
    index = checks.index_of(checks.random_lists(length, 2), length)
    output, lse = ops.sparse_prefill_attention(8 * q, k, torch.ones_like(v), index, **given)
    assert lse.max() > 100
    assert (output[lse.t() != -torch.inf] - 1).abs().max() < 8 * 2**-24


def test_logits_of_hundreds_are_not_rounded_to_the_dtype() -> None:
    """Trained heads have them: with products of bf16 the log-sum-exp was off by 1.2, and recall by as much."""
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, heads, 64, generator=drawn) for size, heads in ((300, 2), (700, 1), (700, 1)))
    q, k, v = (q + 10 * torch.randn(64, generator=drawn)).bfloat16(), (k + 10 * torch.ones(64)).bfloat16(), v.bfloat16()
    every_column = ops.SparseIndex.of_heads(700, [torch.arange(700)] * 2, [torch.zeros(0, 2, dtype=torch.int32)] * 2)
    lse = ops.sparse_prefill_attention(q, k, v, every_column, chunks=None, tables=None)[1]
    dense = ops.dual_chunk_attention(q[None], k[None], v[None], chunks=None, tables=None)[1][0]
    assert dense.abs().max() > 50
    assert (lse - dense).abs().max() < 1e-3


def test_the_operation_is_registered_as_torch_wants_it() -> None:
    rows, length = 9, 31
    heads = checks.inputs(rows, length, torch.float32)
    given = checks.options(LAYOUTS[0], rows, length, torch.float32)
    index = checks.index_of(checks.random_lists(length, 3), length)
    lists = index.verticals, index.vertical_bounds, index.slashes, index.slash_bounds
    operation = torch.ops.megatron_qwen.sparse_prefill_attention.default
    arguments = (*heads, *lists, *given["tables"], given["logit_scale"], [8, 3, 8], False, checks.SIZE**-0.5)
    torch.library.opcheck(operation, arguments)
    expected = ops.sparse_prefill_attention(*heads, index, **given)
    assert all(torch.equal(a, b) for a, b in zip(operation(*arguments), expected, strict=True))


def refused(words: str, index: ops.SparseIndex | None = None, **changed: Any) -> None:
    q, k, v = checks.inputs(5, 9, torch.float32)
    given = {"q": q, "k": k, "v": v, "index": index or ops.SparseIndex.full(9, 4)}
    with pytest.raises(ConfigError, match=words):
        ops.sparse_prefill_attention(**{**given, **checks.options(LAYOUTS[0], 5, 9, torch.float32), **changed})


def test_wrong_arguments_are_named() -> None:
    refused("5 heads and 9 keys; expected 4 and 9", index=ops.SparseIndex.full(9, 5))
    refused("4 heads and 8 keys; expected 4 and 9", index=ops.SparseIndex.full(8, 4))
    refused("requires a gradient", q=torch.zeros(5, 4, 8, requires_grad=True))
    refused("expected no more queries than keys", q=torch.zeros(10, 4, 8))
    refused(r"expected \[S, H, D\]", q=torch.zeros(1, 5, 4, 8))
    refused("tables is None", tables=None)


def test_a_wrong_index_is_named() -> None:
    column, interval = torch.tensor([3]), torch.tensor([[0, 4]])
    for verticals, slashes, words in (
        (torch.tensor([3, 3]), interval, "verticals of head 1"),
        (torch.tensor([9]), interval, "verticals of head 1"),
        (column, torch.tensor([[0, 4], [4, 5]]), "slashes of head 1"),
        (column, torch.tensor([[2, 10]]), "slashes of head 1"),
        (column, torch.tensor([[-1, 3]]), "slashes of head 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            ops.SparseIndex.of_heads(9, [column, verticals], [interval, slashes])
    bounds = torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="vertical_bounds is"):
        ops.SparseIndex(9, column.int(), torch.tensor([0, 2]), interval.int(), bounds)
    with pytest.raises(ConfigError, match="expected contiguous int32"):
        ops.SparseIndex(9, column, bounds, interval.int(), bounds)
    with pytest.raises(ConfigError, match="distances do not ascend"):
        intervals(torch.tensor([2, 1]), 9)
    with pytest.raises(ConfigError, match="merge_gap"):
        intervals(torch.tensor([1, 2]), 9, -1)
