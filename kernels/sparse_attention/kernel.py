"""Attention over the pairs that an index keeps, in Triton: one pass over the kept keys of a tile, one online softmax.

As in dense attention (`dual_chunk_attention/kernel.py`) a program has a tile of rows of one chunk and one head, and
walks through older chunks, the previous one and its own, rotating its rows anew for each. Of a segment it reads:

1. blocks of keys all of whose pairs lie in a slash, without a mask;
2. blocks that a slash covers in part, and those that the segment's ends cut, with a mask;
3. vertical columns that are in no block of 1 or 2, gathered.

Where the blocks are is the same for every tile relative to its first row (`blocks.py`), so lists are per head. Masks
come from bitmaps (`bitmap_kernel.py`): the distances of a row and the keys of a block are 64 neighbouring bits.

Shapes: S, K tokens of q and k, H, G heads of queries and keys, D = 2 HALF head size, C blocks of a head at most, V
verticals and W words of a bitmap of all heads.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..dual_chunk_attention.request import AttentionRequest
from ..dual_chunk_attention.rotate_kernel import rotated_keys
from ..dual_chunk_attention.tile_lists import strides, tiles_of_queries
from ..dual_chunk_attention.tiles import (
    IS_INTERPRETED,
    constants,
    is_before_hopper,
    keys_of_segment,
    load_halves,
    load_queries,
    numbers,
    query_position,
    rotations,
    tile_range,
)
from .bitmap_kernel import COVERED, PAD, SLASH, VERTICAL, bitmaps, count_below, window
from .blocks import PARTIAL, WHOLE, tile_blocks
from .index import SparseIndex

_WHOLE, _PARTIAL = tl.constexpr(WHOLE), tl.constexpr(PARTIAL)
# Per segment: ends of the blocks that touch it and of those inside of it, whole ones, then ends of partial ones.
_ENDS = tl.constexpr(8)


@triton.jit
def _ends_of_blocks(
    starts_ptr, counts_ptr, room, steps, begin, chunk_begin, end, stride, query_start, rows_k,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Return [32] numbers of blocks: 8 for each segment, see `_ENDS`; one search for all."""
    lane = tl.arange(0, 4 * _ENDS)
    which = lane % _ENDS
    low, high, _ = keys_of_segment(lane // _ENDS, chunk_begin, begin, end, stride, query_start, 0, rows_k, BLOCK_KEYS)
    # A block at x has keys begin - x - BLOCK_KEYS + 1 to begin - x.
    touches_high, touches_low = begin - BLOCK_KEYS + 2 - high, begin - low + 1
    target = tl.where(which % 2 == 0, touches_high, touches_low)
    target = tl.where(which == 2, begin - high + 1, target)
    target = tl.where(which == 3, begin - BLOCK_KEYS + 2 - low, target)
    kind = tl.where(which < 4, _WHOLE, _PARTIAL)
    return count_below(starts_ptr + kind * room, tl.load(counts_ptr + kind), target, steps)


@triton.jit
def _ends_of_columns(
    columns_ptr, count, steps, begin, chunk_begin, end, stride, query_start, rows_k, BLOCK_KEYS: tl.constexpr
):  # fmt: skip
    """Return [8] numbers of columns: first and last one of each segment."""
    lane = tl.arange(0, 8)
    low, high, _ = keys_of_segment(lane // 2, chunk_begin, begin, end, stride, query_start, 0, rows_k, BLOCK_KEYS)
    target = tl.where(lane % 2 == 0, low, tl.maximum(high, low))
    return count_below(columns_ptr, tl.zeros_like(lane) + count, target, steps)


@triton.jit
def _pick(vector, at, SIZE: tl.constexpr):
    """Return one number of a vector."""
    return tl.sum(tl.where(tl.arange(0, SIZE) == at, vector, 0), axis=0)


@triton.jit
def _logits(q1, q2, k1, k2, WIDENS: tl.constexpr):
    """Return products of rows [R] and keys [B], both in halves."""
    if WIDENS:
        k1, k2 = k1.to(tl.float32), k2.to(tl.float32)
    return tl.dot(q2, k2.T, tl.dot(q1, k1.T, input_precision="ieee"), input_precision="ieee")


@triton.jit
def _fold(logits, v, row_scale, largest, total, out, WIDENS: tl.constexpr):
    """Fold logits [R, B], -inf where a pair does not count, into the softmax."""
    new_largest = tl.maximum(largest, tl.max(logits, axis=1) * row_scale)
    # A row that has not met a key: exp2(-inf - 0) is 0 where exp2(-inf - -inf) would be NaN.
    finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    probabilities = tl.exp2(logits * row_scale[:, None] - finite[:, None])
    decay = tl.exp2(largest - finite)
    total = total * decay + tl.sum(probabilities, axis=1)
    out = out * decay[:, None]
    probabilities = probabilities.to(v.dtype)
    if WIDENS:
        probabilities, v = probabilities.to(tl.float32), v.to(tl.float32)
    return new_largest, total, tl.dot(probabilities, v, out, input_precision="ieee")


@triton.jit
def _ones(count):
    """Return words whose first `count` bits are set; counts below 0 and above 64 are none and all."""
    none = tl.zeros_like(count).to(tl.uint64)
    some = ((none + 1) << tl.minimum(tl.maximum(count, 0), 63).to(tl.uint64)) - 1
    return tl.where(count > 63, none - 1, some)


@triton.jit
def _kept_of_block(bitmaps_ptr, words, x, key, row, low, high, begin, PAD: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Return for each row the keys of a block at x that count, bit c for key + c."""
    in_slash = window(bitmaps_ptr, words * (SLASH * 64 + 64) - 2 * PAD - x - BLOCK_KEYS - row)
    is_seen = window(bitmaps_ptr, words * (VERTICAL * 64) + PAD + key) & _ones(begin + row - key + 1)
    kept = (in_slash | is_seen) & _ones(row * 0 + high - key)
    return kept ^ (kept & _ones(row * 0 + low - key))


# A size of 1 would become a Python constant, which has no dtype.
@triton.jit(do_not_specialize=("query_start", "rows_q", "rows_k", "first_tile", "table_rows", "room", "words", "steps"))
def sparse_forward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, logit_scale_ptr, out_ptr, lse_ptr,
    starts_ptr, counts_ptr, columns_ptr, bounds_ptr, bitmaps_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, room, words, steps,
    rows_q, rows_k, query_start, first_tile, table_rows, stride, per_chunk, cap, inter, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, FIRST_SEGMENT: tl.constexpr, ROTATES: tl.constexpr,
    PAD: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, WIDENS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Write out and lse of one tile and one head; `scale` is log2(e) times that of the logits."""
    head = tl.program_id(0) % HEADS
    tile = first_tile - tl.program_id(0) // HEADS
    chunk_begin, begin, end = tile_range(tile, stride, per_chunk, query_start, rows_q, BLOCK_QUERIES)
    row, column = tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_KEYS)
    position = begin + row
    is_row = (position >= query_start) & (position < end)
    first_row = tl.cast(begin - query_start, tl.int64)
    head_q, head_k = head.to(tl.int64), (head // GROUP).to(tl.int64)
    q_base = q_ptr + head_q * q_head + first_row * q_row
    k_base, v_base = k_ptr + head_k * k_head, v_ptr + head_k * v_head
    # Offsets of 32 bits instead of pointers: a register each.
    bitmaps_ptr += 3 * head_q * words
    starts_begin, columns_begin = head * (2 * room + 1), tl.load(bounds_ptr + head).to(tl.int32)
    ends = _ends_of_blocks(
        starts_ptr + starts_begin,
        counts_ptr + 2 * head,
        room,
        steps,
        begin,
        chunk_begin,
        end,
        stride,
        query_start,
        rows_k,
        BLOCK_KEYS,
    )
    ends_of_columns = _ends_of_columns(
        columns_ptr + columns_begin, tl.load(bounds_ptr + head + 1).to(tl.int32) - columns_begin, steps, begin,
        chunk_begin, end, stride, query_start, rows_k, BLOCK_KEYS,
    )  # fmt: skip
    row_scale = tl.full([BLOCK_QUERIES], 1.0, tl.float32) * scale
    if logit_scale_ptr is not None:
        row_scale *= tl.load(logit_scale_ptr + first_row + row, mask=is_row, other=1.0)
    largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    out = tl.zeros([BLOCK_QUERIES, 2 * HALF], tl.float32)
    for segment in range(FIRST_SEGMENT, 3):
        low, high, _ = keys_of_segment(segment, chunk_begin, begin, end, stride, query_start, 0, rows_k, BLOCK_KEYS)
        if low < high:
            angle = query_position(segment, position - chunk_begin, stride, cap, inter)
            q1, q2 = load_queries(
                q_base, row, q_row, is_row, cos_ptr, sin_ptr, angle, table_rows, HALF, ROTATES, WIDENS
            )
            lane = segment * _ENDS
            first, last = _pick(ends, lane, 4 * _ENDS), _pick(ends, lane + 1, 4 * _ENDS)
            inner, outer = _pick(ends, lane + 2, 4 * _ENDS), _pick(ends, lane + 3, 4 * _ENDS)
            outer = tl.maximum(outer, inner)
            for number in tl.range(inner, outer, num_stages=STAGES):
                key = tl.cast(begin - tl.load(starts_ptr + (starts_begin + number)) - (BLOCK_KEYS - 1), tl.int64)
                k_ptrs = k_base + key * k_row + column[:, None] * k_row + tl.arange(0, HALF)[None, :]
                v_ptrs = v_base + key * v_row + column[:, None] * v_row + tl.arange(0, 2 * HALF)[None, :]
                logits = _logits(q1, q2, tl.load(k_ptrs), tl.load(k_ptrs + HALF), WIDENS)
                largest, total, out = _fold(logits, tl.load(v_ptrs), row_scale, largest, total, out, WIDENS)
            # Partial blocks, then whole ones that the later and the earlier end of the segment cut.
            first_partial, cut = _pick(ends, lane + 4, 4 * _ENDS), inner - first
            partial = _pick(ends, lane + 5, 4 * _ENDS) - first_partial
            for number in tl.range(0, partial + cut + last - outer, num_stages=2):
                at = tl.where(
                    number < partial, room + first_partial + number, tl.where(number < partial + cut, first, outer)
                )
                x = tl.load(starts_ptr + (starts_begin + at))
                key = begin - x - (BLOCK_KEYS - 1)
                words_of_rows = _kept_of_block(bitmaps_ptr, words, x, key, row, low, high, begin, PAD, BLOCK_KEYS)
                is_key = (key + column >= low) & (key + column < high)
                offset = tl.cast(key, tl.int64)
                k1, k2 = load_halves(k_base + offset * k_row, column, k_row, is_key, HALF)
                v_ptrs = v_base + offset * v_row + column[:, None] * v_row + tl.arange(0, 2 * HALF)[None, :]
                v = tl.load(v_ptrs, mask=is_key[:, None], other=0.0)
                logits = _logits(q1, q2, k1, k2, WIDENS)
                # Behind the product: 32 flags of a thread would be held through it.
                early, late = words_of_rows.to(tl.uint32), (words_of_rows >> 32).to(tl.uint32)
                half = tl.where((column < 32)[None, :], early[:, None], late[:, None])
                kept = ((half >> (column % 32).to(tl.uint32)[None, :]) & 1) != 0
                logits = tl.where(kept, logits, float("-inf"))
                largest, total, out = _fold(logits, v, row_scale, largest, total, out, WIDENS)
            last_column = _pick(ends_of_columns, 2 * segment + 1, 8)
            for number in tl.range(_pick(ends_of_columns, 2 * segment, 8), last_column, BLOCK_KEYS, num_stages=2):
                is_key = number + column < last_column
                key = tl.load(columns_ptr + (columns_begin + number + column), mask=is_key, other=0)
                at = words * (COVERED * 64) + PAD + begin - key
                covered = tl.load(bitmaps_ptr + at // 64, mask=is_key, other=0).to(tl.uint64, bitcast=True)
                is_key &= ((covered >> (at % 64).to(tl.uint64)) & 1) == 0
                offset = key.to(tl.int64)
                k1, k2 = load_halves(k_base, offset, k_row, is_key, HALF)
                v_ptrs = v_base + offset[:, None] * v_row + tl.arange(0, 2 * HALF)[None, :]
                v = tl.load(v_ptrs, mask=is_key[:, None], other=0.0)
                logits = _logits(q1, q2, k1, k2, WIDENS)
                kept = tl.where(is_key, key, 1 << 30)[None, :] <= position[:, None]
                logits = tl.where(kept, logits, float("-inf"))
                largest, total, out = _fold(logits, v, row_scale, largest, total, out, WIDENS)
    has_keys = total > 0.0
    out = out / tl.where(has_keys, total, 1.0)[:, None]
    lse = tl.where(has_keys, (largest + tl.log2(tl.where(has_keys, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + head_q * rows_q + first_row + row, lse, mask=is_row)
    out_base = out_ptr + (first_row * HEADS + head) * (2 * HALF)
    out_offset = row[:, None] * (HEADS * 2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_base + out_offset, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


def launch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: SparseIndex, request: AttentionRequest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output [S, H, D], contiguous, and lse [H, S] in fp32; head sizes 64 and 128."""
    rows, heads = q.shape[:2]
    output = q.new_empty(q.shape)
    lse = q.new_empty((heads, rows), dtype=torch.float32)
    if not q.numel():
        return output, lse
    sizes = _blocks(q)
    keys = rotated_keys(k.unsqueeze(0), request)[0]
    blocks = tile_blocks(index, sizes["BLOCK_QUERIES"], sizes["BLOCK_KEYS"])
    room = blocks.starts.shape[-1]
    bits = bitmaps(index, blocks, sizes["BLOCK_KEYS"])
    tiles = tiles_of_queries(request, q.unsqueeze(0), sizes["BLOCK_QUERIES"])
    given = numbers(q.unsqueeze(0), k.unsqueeze(0), request, tiles)
    fixed = constants(q, k, request)
    sparse_forward_kernel[(tiles.slots * heads,)](
        q, keys, v, *(request.tables or (None, None)), request.logit_scale, output, lse,
        blocks.starts, blocks.counts, index.verticals, index.vertical_bounds, bits,
        *strides(q)[1:], *strides(keys)[1:], *strides(v)[1:], room, bits.shape[-1],
        max(room, index.length).bit_length(),
        **{name: number for name, number in given.items() if name not in ("batch", "key_start")},
        **rotations(request), scale=request.scale * math.log2(math.e),
        **{name: number for name, number in fixed.items() if name != "PACKED"},
        ROTATES=request.tables is not None, PAD=PAD, **sizes,
    )  # fmt: skip
    return output, lse


def _blocks(q: torch.Tensor) -> dict[str, Any]:
    """Sizes of tiles and of programs; a bitmap's window is 64 bits, so no more than 64 keys at a time.

    More keys at a time spill some registers where there are three segments: heads of 128 numbers with 64 keys on sm_90,
    of 64 with as many on sm_80, and in fp32 of 64 with 32 on both, of 128 with 32 on sm_80 (with 16 on sm_90).
    """
    is_wide = q.shape[-1] > 64
    if IS_INTERPRETED:
        # So small that short sequences have several.
        return {"BLOCK_QUERIES": 16, "BLOCK_KEYS": 16, "WIDENS": q.dtype == torch.bfloat16, "STAGES": 1}
    if q.dtype == torch.float32:
        queries, keys, stages = (32, 16 if is_before_hopper() else 32, 2) if is_wide else (64, 16, 2)
    else:
        queries, keys, stages = 128, 32 if is_wide or is_before_hopper() else 64, 3
    return {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "num_warps": 8, "WIDENS": False, "STAGES": stages}
