"""Attention of one query per sequence over a paged cache in Triton: one launch over parts of the keys, one to merge.

A part is a range of keys inside one segment (see `layout.py`), so a program rotates its query once. The lengths stay on
the device: a segment of n keys is cut into cdiv(n, size) parts of `size` = cdiv(length, SPLITS) keys, rounded up to
blocks, and the launch has room for the SPLITS + 2 parts that three segments can come to.

Shapes: B sequences, P pages, N tokens of a page, Hq, Hkv heads, D = 2 HALF head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..column_sum import multiprocessors
from .layout import ChunkLayout
from .tile_lists import LONGEST
from .tiles import INTER, INTRA, IS_INTERPRETED, SUCC, query_position

# Rows of the smallest product of tensor cores: the query heads of a key head are padded to so many.
SMALLEST_PRODUCT = 16
# Programs per multiprocessor, so that the last ones to end leave little of the device idle.
PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def _part(part, length, stride, splits, BLOCK_KEYS: tl.constexpr):
    """Return segment and range of keys of a part; an empty range if there are fewer parts."""
    size = tl.maximum(tl.cdiv(tl.cdiv(length, splits), BLOCK_KEYS), 1) * BLOCK_KEYS
    chunk_begin = tl.maximum(length - 1, 0) // stride * stride
    previous = tl.maximum(chunk_begin - stride, 0)
    parts_of_inter = tl.cdiv(previous, size)
    parts_of_succ = tl.cdiv(chunk_begin - previous, size)
    is_inter = part < parts_of_inter
    is_succ = (part >= parts_of_inter) & (part < parts_of_inter + parts_of_succ)
    segment = tl.where(is_inter, INTER, tl.where(is_succ, SUCC, INTRA))
    first = tl.where(is_inter, 0, tl.where(is_succ, previous, chunk_begin))
    end = tl.where(is_inter, previous, tl.where(is_succ, chunk_begin, length))
    before = tl.where(is_inter, 0, tl.where(is_succ, parts_of_inter, parts_of_inter + parts_of_succ))
    low = first + (part - before) * size
    return segment, low, tl.minimum(low + size, end), chunk_begin


@triton.jit(do_not_specialize=("table_rows", "splits"))
def dca_decode_kernel(
    q_ptr, key_ptr, value_ptr, page_table_ptr, lengths_ptr, cos_ptr, sin_ptr, logit_scale_ptr, part_ptr, lse_ptr,
    q_batch, q_head, k_page, k_token, k_head, v_page, v_token, v_head, table_row, table_rows, stride, cap, inter,
    splits, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, ROTATES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEYS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Write outputs [parts, B, HEADS, D] and log2-sum-exp2 [parts, B, HEADS], fp32, of the query heads of a key head.

    The grid is key heads times B, and parts.
    """
    HEADS_K: tl.constexpr = HEADS // GROUP
    head_k = (tl.program_id(0) % HEADS_K).to(tl.int64)
    index = (tl.program_id(0) // HEADS_K).to(tl.int64)
    length = tl.load(lengths_ptr + index).to(tl.int32)
    segment, low, high, chunk_begin = _part(tl.program_id(1), length, stride, splits, BLOCK_KEYS)
    member = tl.arange(0, BLOCK_HEADS)
    is_head = member < GROUP
    column = tl.arange(0, HALF)[None, :]
    q_ptrs = q_ptr + index * q_batch + (head_k * GROUP + member)[:, None] * q_head + column
    q1 = tl.load(q_ptrs, mask=is_head[:, None], other=0.0)
    q2 = tl.load(q_ptrs + HALF, mask=is_head[:, None], other=0.0)
    if ROTATES:
        position = query_position(segment, length - 1 - chunk_begin, stride, cap, inter)
        known = (position >= 0) & (position < table_rows)
        cos = tl.load(cos_ptr + position.to(tl.int64) * HALF + column, mask=known, other=float("nan"))
        sin = tl.load(sin_ptr + position.to(tl.int64) * HALF + column, mask=known, other=float("nan"))
        x1, x2 = q1.to(tl.float32), q2.to(tl.float32)
        q1, q2 = (x1 * cos - x2 * sin).to(q1.dtype), (x2 * cos + x1 * sin).to(q2.dtype)
    if WIDENS:
        q1, q2 = q1.to(tl.float32), q2.to(tl.float32)
    if logit_scale_ptr is not None:
        scale *= tl.load(logit_scale_ptr + index)
    largest = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    out = tl.zeros([BLOCK_HEADS, 2 * HALF], tl.float32)
    for first in range(low, high, BLOCK_KEYS):
        key = first + tl.arange(0, BLOCK_KEYS)
        is_key = key < high
        page = tl.load(page_table_ptr + index * table_row + key // PAGE, mask=is_key, other=0).to(tl.int64)
        k_row = key_ptr + head_k * k_head + page * k_page + (key % PAGE) * k_token
        v_row = value_ptr + head_k * v_head + page * v_page + (key % PAGE) * v_token
        k1 = tl.load(k_row[:, None] + column, mask=is_key[:, None], other=0.0)
        k2 = tl.load(k_row[:, None] + HALF + column, mask=is_key[:, None], other=0.0)
        v = tl.load(v_row[:, None] + tl.arange(0, 2 * HALF)[None, :], mask=is_key[:, None], other=0.0)
        dtype = v.dtype
        if WIDENS:
            k1, k2, v = k1.to(tl.float32), k2.to(tl.float32), v.to(tl.float32)
        logits = tl.dot(q1, k1.T, input_precision="ieee")
        logits = tl.dot(q2, k2.T, logits, input_precision="ieee")
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        # A part that has keys has one in its first block, so the largest is finite.
        new_largest = tl.maximum(largest, tl.max(logits, axis=1) * scale)
        probabilities = tl.exp2(logits * scale - new_largest[:, None])
        decay = tl.exp2(largest - new_largest)
        total = total * decay + tl.sum(probabilities, axis=1)
        out = tl.dot(probabilities.to(dtype).to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        largest = new_largest
    total_or_one = tl.where(total > 0.0, total, 1.0)
    lse = tl.where(total > 0.0, largest + tl.log2(total_or_one), float("-inf"))
    at = (tl.program_id(1) * (tl.num_programs(0) // HEADS_K) + index) * HEADS + head_k * GROUP + member
    tl.store(lse_ptr + at, lse, mask=is_head)
    part_ptrs = part_ptr + at[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(part_ptrs, out / total_or_one[:, None], mask=is_head[:, None])


@triton.jit(do_not_specialize=("parts",))
def dca_merge_kernel(part_ptr, lse_ptr, out_ptr, parts, SIZE: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """Write out [rows, SIZE] from parts [parts, rows, SIZE] weighted by exp2(lse); 0 where none has keys."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    column = tl.arange(0, SIZE)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    out = tl.zeros([SIZE], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = (first + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        lse = tl.load(lse_ptr + part * rows + row, mask=part < parts, other=float("-inf"))
        new_largest = tl.maximum(largest, tl.max(lse, axis=0))
        finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weight, decay = tl.exp2(lse - finite), tl.exp2(largest - finite)
        values = tl.load(
            part_ptr + (part * rows + row)[:, None] * SIZE + column[None, :], mask=(part < parts)[:, None], other=0.0
        )
        out = out * decay + tl.sum(values * weight[:, None], axis=0)
        total = total * decay + tl.sum(weight, axis=0)
        largest = new_largest
    out = out / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * SIZE + column, out.to(out_ptr.dtype.element_ty))


def launch_decode(
    q: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    logit_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Return [B, Hq, D]; head sizes 64 and 128. See `paged_decode_attention` for the arguments."""
    output = q.new_empty(q.shape)
    if not q.numel():
        return output
    page_table, lengths = page_table.contiguous(), lengths.contiguous()
    (batch, heads, size), heads_k, page = q.shape, key_pages.shape[2], key_pages.shape[1]
    sizes = _blocks(q)
    splits = _splits(batch * heads_k, page_table.shape[1] * page, sizes["BLOCK_KEYS"], q.device)
    # The last part of a segment may be shorter.
    parts = splits if chunks is None else splits + 2
    partial = q.new_empty((parts, batch, heads, size), dtype=torch.float32)
    lse = q.new_empty((parts, batch, heads), dtype=torch.float32)
    dca_decode_kernel[(batch * heads_k, parts)](
        q, key_pages, value_pages, page_table, lengths, *(tables or (None, None)), logit_scale, partial, lse,
        *q.stride()[:2], *key_pages.stride()[:3], *value_pages.stride()[:3], page_table.stride(0),
        tables[0].shape[0] if tables else 0, LONGEST if chunks is None else chunks.stride,
        LONGEST if chunks is None else chunks.limit, 0 if chunks is None else chunks.inter_position, splits,
        scale * math.log2(math.e), HEADS=heads, GROUP=heads // heads_k, HALF=size // 2, PAGE=page,
        ROTATES=tables is not None, BLOCK_HEADS=max(SMALLEST_PRODUCT, triton.next_power_of_2(heads // heads_k)),
        **sizes,
    )  # fmt: skip
    dca_merge_kernel[(batch * heads,)](
        partial, lse, output, parts, SIZE=size, BLOCK_PARTS=min(16, triton.next_power_of_2(parts)), num_warps=4
    )
    return output


def _splits(sequences: int, longest: int, block: int, device: torch.device) -> int:
    """Return into how many parts to cut the keys of each of so many (sequence, key head) pairs."""
    wanted = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device), sequences)
    return max(1, min(wanted, triton.cdiv(longest, block)))  # type: ignore[no-any-return]


def _blocks(q: torch.Tensor) -> dict[str, Any]:
    if IS_INTERPRETED:
        return {"BLOCK_KEYS": 16, "WIDENS": q.dtype == torch.bfloat16}
    keys = 32 if q.dtype == torch.float32 else 64
    return {"BLOCK_KEYS": keys, "num_warps": 4, "num_stages": 3, "WIDENS": False}
