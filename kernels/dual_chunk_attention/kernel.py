"""Dual Chunk Attention in Triton, forward: one pass over the keys, one online softmax.

Segments come in the order older chunks, previous chunk, own chunk; between them only the query operand changes: it is
rotated from the raw tile again, at most three times per tile. Maximum, sum and output go on. Keys are rotated once,
before (`rotate_kernel`), where the caller has not done so. Plain attention has the last segment only.

Logits stay in registers as powers of two: exp(scale x) = exp2(scale log2(e) x). Scales have to be positive, as the
largest logit is looked for before scaling.

Shapes: B sequences, T tokens of packed ones, Sq, Sk tokens of q and k, Hq, Hkv heads, D = 2 HALF head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .kernel_backward import launch_backward
from .request import AttentionRequest
from .rotate_kernel import rotated_keys
from .tile_lists import strides, tiles_of_queries
from .tiles import (
    IS_INTERPRETED,
    UNSPECIALIZED,
    constants,
    is_before_hopper,
    keys_of_segment,
    load_halves,
    load_queries,
    locate_rows,
    numbers,
    query_position,
    rotations,
)

__all__ = ["launch_backward", "launch_forward"]


@triton.jit
def _fold(
    q1, q2, row_scale, position, largest, total, out, k_base, v_base, k_row, v_row, key, end,
    HALF: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASKED: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Fold keys `key` ... into the softmax; `position` is that of the rows, `end` the first key beyond the segment."""
    row = tl.arange(0, BLOCK_KEYS)
    if MASKED:
        is_key = key + row < end
        k1, k2 = load_halves(k_base, row, k_row, is_key, HALF)
        v = tl.load(v_base + row[:, None] * v_row + tl.arange(0, 2 * HALF)[None, :], mask=is_key[:, None], other=0.0)
    else:
        k_ptrs = k_base + row[:, None] * k_row + tl.arange(0, HALF)[None, :]
        k1, k2 = tl.load(k_ptrs), tl.load(k_ptrs + HALF)
        v = tl.load(v_base + row[:, None] * v_row + tl.arange(0, 2 * HALF)[None, :])
    if WIDENS:
        k1, k2, v = k1.to(tl.float32), k2.to(tl.float32), v.to(tl.float32)
    logits = tl.dot(q1, k1.T, input_precision="ieee")
    logits = tl.dot(q2, k2.T, logits, input_precision="ieee")
    if MASKED:
        is_visible = (key + row)[None, :] <= tl.minimum(position, end - 1)[:, None]
        logits = tl.where(is_visible, logits, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(logits, axis=1) * row_scale)
    # A row that has not met a key: exp2(-inf - 0) is 0 where exp2(-inf - -inf) would be NaN.
    finite = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    probabilities = tl.exp2(logits * row_scale[:, None] - finite[:, None])
    decay = tl.exp2(largest - finite)
    total = total * decay + tl.sum(probabilities, axis=1)
    out = out * decay[:, None]
    out = tl.dot(probabilities.to(v_base.dtype.element_ty).to(v.dtype), v, out, input_precision="ieee")
    return new_largest, total, out


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dca_forward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, logit_scale_ptr, out_ptr, lse_ptr, tiles_ptr, cu_q_ptr, cu_k_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    batch, rows_q, rows_k, query_start, key_start, first_tile, table_rows, stride, per_chunk, cap, inter, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, FIRST_SEGMENT: tl.constexpr, PACKED: tl.constexpr,
    ROTATES: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Write out and lse of one tile and one head; `scale` is log2(e) times that of the logits."""
    head, head_k, at, first_row, first_key, q_start, key_end, chunk_begin, begin, end = locate_rows(
        tiles_ptr, cu_q_ptr, cu_k_ptr, batch, rows_q, rows_k, query_start, key_start, first_tile, stride, per_chunk,
        HEADS, GROUP, PACKED, BLOCK_QUERIES,
    )  # fmt: skip
    if at < 0:
        return
    row = tl.arange(0, BLOCK_QUERIES)
    position = begin + row
    is_row = (position >= q_start) & (position < end)
    q_base = q_ptr + at * q_batch + head * q_head + first_row * q_row
    k_base = k_ptr + at * k_batch + head_k * k_head + first_key * k_row
    v_base = v_ptr + at * v_batch + head_k * v_head + first_key * v_row
    row_scale = tl.full([BLOCK_QUERIES], 1.0, tl.float32) * scale
    if logit_scale_ptr is not None:
        row_scale *= tl.load(logit_scale_ptr + first_row + row, mask=is_row, other=1.0)
    largest = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    out = tl.zeros([BLOCK_QUERIES, 2 * HALF], tl.float32)
    for segment in range(FIRST_SEGMENT, 3):
        low, high, masked_from = keys_of_segment(
            segment, chunk_begin, begin, end, stride, q_start, key_start, key_end, BLOCK_KEYS
        )
        if low < high:
            angle = query_position(segment, position - chunk_begin, stride, cap, inter)
            q1, q2 = load_queries(
                q_base, row, q_row, is_row, cos_ptr, sin_ptr, angle, table_rows, HALF, ROTATES, WIDENS
            )
            for key in tl.range(low, masked_from, BLOCK_KEYS):
                offset = tl.cast(key, tl.int64)
                largest, total, out = _fold(
                    q1, q2, row_scale, position, largest, total, out, k_base + offset * k_row, v_base + offset * v_row,
                    k_row, v_row, key, high, HALF, BLOCK_KEYS, False, WIDENS,
                )  # fmt: skip
            for key in tl.range(masked_from, high, BLOCK_KEYS, num_stages=1):
                offset = tl.cast(key, tl.int64)
                largest, total, out = _fold(
                    q1, q2, row_scale, position, largest, total, out, k_base + offset * k_row, v_base + offset * v_row,
                    k_row, v_row, key, high, HALF, BLOCK_KEYS, True, WIDENS,
                )  # fmt: skip
    has_keys = total > 0.0
    out = out / tl.where(has_keys, total, 1.0)[:, None]
    lse = tl.where(has_keys, (largest + tl.log2(tl.where(has_keys, total, 1.0))) * 0.6931471805599453, float("-inf"))
    tl.store(lse_ptr + (at * HEADS + head) * rows_q + first_row + row, lse, mask=is_row)
    out_base = out_ptr + ((at * rows_q + first_row) * HEADS + head) * (2 * HALF)
    out_offset = row[:, None] * (HEADS * 2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(out_base + out_offset, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


def launch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, request: AttentionRequest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output like q, contiguous, and lse [B, Hq, Sq] or [Hq, Tq]; head sizes 64 and 128."""
    heads, rows = q.shape[-2], q.shape[-3]
    output = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-3], heads, rows), dtype=torch.float32)
    if not q.numel():
        return output, lse
    sizes = _blocks(q)
    k = rotated_keys(k, request)
    tiles = tiles_of_queries(request, q, sizes["BLOCK_QUERIES"])
    dca_forward_kernel[(tiles.slots * heads,)](
        q, k, v, *(request.tables or (None, None)), request.logit_scale, output, lse, tiles.list_of_tiles,
        *(request.cu_seqlens or (None, None)), *strides(q), *strides(k), *strides(v),
        **numbers(q, k, request, tiles), **rotations(request), scale=request.scale * math.log2(math.e),
        **constants(q, k, request), ROTATES=request.tables is not None, **sizes,
    )  # fmt: skip
    return output, lse


def _blocks(q: torch.Tensor) -> dict[str, Any]:
    """Sizes of tiles and of programs, the largest that leave nothing to spill.

    With 128 keys at a time, 128 numbers per head spill on sm_90 where there are three segments; on sm_80, whose
    products take operands from registers, with 64.
    """
    is_wide = q.shape[-1] > 64
    if IS_INTERPRETED:
        # So small that short sequences have several.
        return {"BLOCK_QUERIES": 16, "BLOCK_KEYS": 16, "WIDENS": q.dtype == torch.bfloat16}
    if q.dtype == torch.float32:
        queries, keys, stages = 32 if is_wide else 64, 32, 2
    elif is_before_hopper():
        queries, keys, stages = 128, 32 if is_wide else 64, 3
    else:
        queries, keys, stages = 128, 64, 3
    return {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "num_warps": 8, "num_stages": stages, "WIDENS": False}
