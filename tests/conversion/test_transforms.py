from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_qwen.conversion.transforms import (
    HeadSizes,
    concat_gate_up,
    interleave_qkv,
    pad_rows,
    split_gate_up,
    split_qkv,
    unpad_rows,
)
from megatron_qwen.errors import MismatchError

sizes = st.integers(1, 5)
SIZES = HeadSizes(num_groups=1, head_dim=1)


def qkv(groups: int, queries: int, head: int, hidden: int | None) -> tuple[list[torch.Tensor], HeadSizes]:
    tail = () if hidden is None else (hidden,)
    rows = (groups * queries * head, groups * head, groups * head)
    return [torch.randn(n, *tail) for n in rows], HeadSizes(num_groups=groups, head_dim=head)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, st.one_of(st.none(), sizes))
def test_qkv_splits_into_what_was_interleaved(groups, queries, head, hidden):
    sources, head_sizes = qkv(groups, queries, head, hidden)
    back = split_qkv(interleave_qkv(sources, head_sizes), head_sizes)
    assert all(torch.equal(a, b) for a, b in zip(sources, back, strict=True))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_qkv_interleaves_what_was_split(groups, queries, head, hidden):
    merged = torch.randn(groups * (queries + 2) * head, hidden)
    head_sizes = HeadSizes(num_groups=groups, head_dim=head)
    assert torch.equal(interleave_qkv(split_qkv(merged, head_sizes), head_sizes), merged)


def test_qkv_rows_are_grouped_as_megatron_reads_them():
    sources, head_sizes = qkv(groups=2, queries=3, head=4, hidden=5)
    q, k, v = sources
    merged = interleave_qkv(sources, head_sizes).view(2, 5, 4, 5)
    for group in range(2):
        assert torch.equal(merged[group, :3], q.view(2, 3, 4, 5)[group])
        assert torch.equal(merged[group, 3], k.view(2, 4, 5)[group])
        assert torch.equal(merged[group, 4], v.view(2, 4, 5)[group])


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, st.integers(1, 3))
def test_shards_of_the_sources_give_the_shard_of_the_result(groups, queries, head, parts):
    sources, head_sizes = qkv(groups * parts, queries, head, 3)
    whole = interleave_qkv(sources, head_sizes)
    local = HeadSizes(num_groups=groups, head_dim=head)
    for rank in range(parts):
        merged = interleave_qkv([source.chunk(parts)[rank] for source in sources], local)
        assert torch.equal(merged, whole.chunk(parts)[rank])


@settings(max_examples=40, deadline=None)
@given(sizes, sizes)
def test_gate_and_up_split_into_what_was_joined(rows, columns):
    gate, up = torch.randn(rows, columns), torch.randn(rows, columns)
    merged = concat_gate_up([gate, up], SIZES)
    assert torch.equal(merged[:rows], gate)
    assert all(torch.equal(a, b) for a, b in zip((gate, up), split_gate_up(merged, SIZES), strict=True))


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.integers(0, 7))
def test_vocabulary_padding_is_zero_and_comes_off_again(rows, columns, more):
    tensor = torch.randn(rows, columns)
    padded = pad_rows(tensor, rows + more)
    assert padded.shape[0] == rows + more
    assert not padded[rows:].any()
    assert torch.equal(unpad_rows(padded, rows, "embedding"), tensor)


def test_rows_that_are_not_zero_are_no_padding():
    tensor = torch.zeros(8, 3)
    tensor[6, 2] = 1e-30
    with pytest.raises(MismatchError, match=r"embedding: 8 rows.*rows 5|5 \(vocab_size\), and row 6"):
        unpad_rows(tensor, 5, "embedding")
