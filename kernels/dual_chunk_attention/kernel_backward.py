"""Dual Chunk Attention in Triton, the exact gradient.

With P = exp(logits - lse) of all segments under one lse,

    D = rowsum(dO O),  dV = P^T dO,  dS = P (dO V^T - D)
    dK = R(-j mod L) sum over segments dS^T R(p) Q,  dQ = sum over segments R(-p) dS K

where p is the position of a query in that segment. Three launches: D; dK and dV by tiles of keys; dQ by tiles of
queries. The latter two read copies of the queries, rotated for each segment. Nothing is added up in
memory by several programs, so the result has the same bits every time, for 7 products where atomic additions to dQ
would do with 5. What is to be turned back is written in fp32 for `rotate_kernel` to do: beside the products there are
no registers for that (128 x 64 tiles spilled 797 bytes on sm_90).

Shapes: B sequences, T tokens of packed ones, Sq, Sk tokens of q and k, Hq, Hkv heads, D = 2 HALF head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..column_sum import multiprocessors
from .request import AttentionRequest
from .rotate_kernel import rotated_keys, rotated_queries, turn_keys_back, turn_queries_back
from .tile_lists import Tiles, strides, tiles_of_keys, tiles_of_queries
from .tiles import (
    INTER,
    INTRA,
    IS_INTERPRETED,
    UNSPECIALIZED,
    constants,
    is_before_hopper,
    keys_of_segment,
    load_halves,
    locate,
    locate_rows,
    numbers,
    tile_range,
)

BLOCK_ROWS = 32
# Of the keys' kernel, at least: with as many, a causal triangle of tiles, the largest first, keeps the device busy.
PROGRAMS_PER_MULTIPROCESSOR = 2


@triton.jit(do_not_specialize=("rows",))
def dca_delta_kernel(
    grad_ptr, out_ptr, lse_ptr, delta_ptr, exponent_ptr, grad_batch, grad_row, grad_head, out_batch, out_row, out_head,
    rows, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Write D and log2(e) lse [batch, HEADS, rows]; +inf for rows without keys, so that exp2 of anything less is 0."""
    head = (tl.program_id(0) % HEADS).to(tl.int64)
    first_row = (tl.program_id(0) // HEADS).to(tl.int64) * BLOCK_ROWS
    index = tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, SIZE)[None, :]
    is_row = first_row + row < rows
    grad_base = grad_ptr + index * grad_batch + head * grad_head + first_row * grad_row
    out_base = out_ptr + index * out_batch + head * out_head + first_row * out_row
    grad = tl.load(grad_base + row[:, None] * grad_row + column, mask=is_row[:, None], other=0.0).to(tl.float32)
    out = tl.load(out_base + row[:, None] * out_row + column, mask=is_row[:, None], other=0.0).to(tl.float32)
    at = (index * HEADS + head) * rows + first_row + row
    lse = tl.load(lse_ptr + at, mask=is_row, other=0.0)
    tl.store(delta_ptr + at, tl.sum(grad * out, axis=1), mask=is_row)
    exponent = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)
    tl.store(exponent_ptr + at, exponent, mask=is_row)


@triton.jit
def _queries_of_segment(segment, chunk_begin, begin, stride, key_start, q_start, q_end):
    """Return the range of rows that meet a tile of keys in a segment."""
    low = tl.where(segment == INTRA, tl.maximum(begin, key_start), chunk_begin + stride * (2 - segment))
    high = tl.where(segment == INTER, q_end, chunk_begin + stride * (3 - segment))
    return tl.maximum(low, q_start), tl.minimum(high, q_end)


@triton.jit
def _add_to_keys(
    k1, k2, v, dk1, dk2, dv, q_base, grad_base, exponent_base, delta_base, logit_scale_base, q_row, grad_row, query,
    high, key_position, scale,
    HALF: tl.constexpr, BLOCK_QUERIES: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Add what the rows at positions `query` ... high - 1 contribute to the gradients of a tile of keys."""
    row = tl.arange(0, BLOCK_QUERIES)
    is_row = query + row < high
    offset = tl.cast(query, tl.int64)
    q1, q2 = load_halves(q_base + offset * q_row, row, q_row, is_row, HALF)
    grad_ptrs = grad_base + offset * grad_row + row[:, None] * grad_row + tl.arange(0, 2 * HALF)[None, :]
    grad = tl.load(grad_ptrs, mask=is_row[:, None], other=0.0)
    exponent = tl.load(exponent_base + offset + row, mask=is_row, other=float("inf"))
    delta = tl.load(delta_base + offset + row, mask=is_row, other=0.0)
    row_scale = tl.full([BLOCK_QUERIES], 1.0, tl.float32)
    if logit_scale_base is not None:
        row_scale = tl.load(logit_scale_base + offset + row, mask=is_row, other=1.0)
    dtype = grad.dtype
    if WIDENS:
        q1, q2, grad = q1.to(tl.float32), q2.to(tl.float32), grad.to(tl.float32)
    logits = tl.dot(k1, q1.T, input_precision="ieee")
    logits = tl.dot(k2, q2.T, logits, input_precision="ieee")
    probabilities = tl.exp2(logits * (row_scale * scale)[None, :] - exponent[None, :])
    probabilities = tl.where(key_position[:, None] <= (query + row)[None, :], probabilities, 0.0)
    dv = tl.dot(probabilities.to(dtype).to(grad.dtype), grad, dv, input_precision="ieee")
    of_probabilities = tl.dot(v, grad.T, input_precision="ieee")
    of_logits = probabilities * (of_probabilities - delta[None, :])
    if logit_scale_base is not None:
        of_logits *= row_scale[None, :]
    of_logits = of_logits.to(dtype).to(grad.dtype)
    dk1 = tl.dot(of_logits, q1, dk1, input_precision="ieee")
    dk2 = tl.dot(of_logits, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dca_keys_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, exponent_ptr, delta_ptr, logit_scale_ptr, dk_ptr, dv_ptr,
    tiles_ptr, cu_q_ptr, cu_k_ptr, q_copy, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    grad_batch, grad_row, grad_head,
    batch, rows_q, rows_k, query_start, key_start, first_tile, stride, per_chunk, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, FIRST_SEGMENT: tl.constexpr, PACKED: tl.constexpr,
    HEADS_DK: tl.constexpr, HEADS_DV: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Write dk and dv of one tile of one key head, of all GROUP query heads; q holds a copy per segment.

    Rows beyond a segment have exponent inf, hence P = 0, and keys beyond the tile are not stored. The mask is for the
    diagonal; a loop without it for all other blocks made the compiler spill. dk and dv may
    have more heads than the launch: HEADS_DK and HEADS_DV from row to row.
    """
    HEADS_K: tl.constexpr = HEADS // GROUP
    head_k = tl.program_id(0) % HEADS_K
    index, tile, q_begin, q_len, k_begin, k_len, q_start = locate(
        tl.program_id(0) // HEADS_K, tiles_ptr, cu_q_ptr, cu_k_ptr, batch, rows_q, rows_k, query_start, first_tile,
        1, PACKED,
    )  # fmt: skip
    if index < 0:
        return
    chunk_begin, begin, end = tile_range(tile, stride, per_chunk, key_start, k_len, BLOCK_KEYS)
    row = tl.arange(0, BLOCK_KEYS)
    position = begin + row
    is_row = (position >= key_start) & (position < end)
    first_row = k_begin + (begin - key_start)
    at, head_k = index.to(tl.int64), head_k.to(tl.int64)
    k1, k2 = load_halves(k_ptr + at * k_batch + head_k * k_head + first_row * k_row, row, k_row, is_row, HALF)
    v_ptrs = v_ptr + at * v_batch + head_k * v_head + first_row * v_row + row[:, None] * v_row
    v = tl.load(v_ptrs + tl.arange(0, 2 * HALF)[None, :], mask=is_row[:, None], other=0.0)
    if WIDENS:
        k1, k2, v = k1.to(tl.float32), k2.to(tl.float32), v.to(tl.float32)
    dk1 = tl.zeros([BLOCK_KEYS, HALF], tl.float32)
    dk2 = tl.zeros([BLOCK_KEYS, HALF], tl.float32)
    dv = tl.zeros([BLOCK_KEYS, 2 * HALF], tl.float32)
    # Rows of q before position 0.
    before = q_start - q_begin
    logit_scale_base = logit_scale_ptr
    if logit_scale_ptr is not None:
        logit_scale_base = logit_scale_ptr - before
    for member in range(0, GROUP * (3 - FIRST_SEGMENT)):
        head, segment = head_k * GROUP + member % GROUP, FIRST_SEGMENT + member // GROUP
        low, high = _queries_of_segment(segment, chunk_begin, begin, stride, key_start, q_start, q_start + q_len)
        # Bases at position 0.
        q_base = (
            q_ptr + tl.cast(segment - FIRST_SEGMENT, tl.int64) * q_copy + at * q_batch + head * q_head - before * q_row
        )
        grad_base = grad_ptr + at * grad_batch + head * grad_head - before * grad_row
        of_head = (at * HEADS + head) * rows_q - before
        for query in tl.range(low, high, BLOCK_QUERIES):
            dk1, dk2, dv = _add_to_keys(
                k1, k2, v, dk1, dk2, dv, q_base, grad_base, exponent_ptr + of_head, delta_ptr + of_head,
                logit_scale_base, q_row, grad_row, query, high, position, scale, HALF, BLOCK_QUERIES, WIDENS,
            )  # fmt: skip
    factor = scale * 0.6931471805599453
    dk_base = dk_ptr + ((at * rows_k + first_row) * HEADS_DK + head_k) * (2 * HALF)
    dk_base += row[:, None] * (HEADS_DK * 2 * HALF) + tl.arange(0, HALF)[None, :]
    tl.store(dk_base, (dk1 * factor).to(dk_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.store(dk_base + HALF, (dk2 * factor).to(dk_ptr.dtype.element_ty), mask=is_row[:, None])
    dv_base = dv_ptr + ((at * rows_k + first_row) * HEADS_DV + head_k) * (2 * HALF)
    dv_base += row[:, None] * (HEADS_DV * 2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(dv_base, dv.to(dv_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _add_to_queries(
    q1, q2, grad, dq1, dq2, row_scale, exponent, delta, position, k_base, v_base, k_row, v_row, key, high, scale,
    HALF: tl.constexpr, BLOCK_KEYS: tl.constexpr, MASKED: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Add what keys `key` ... contribute to the gradient of a tile of rotated queries, but for the scale."""
    row = tl.arange(0, BLOCK_KEYS)
    is_key = key + row < high
    offset = tl.cast(key, tl.int64)
    k1, k2 = load_halves(k_base + offset * k_row, row, k_row, is_key, HALF)
    v_ptrs = v_base + offset * v_row + row[:, None] * v_row + tl.arange(0, 2 * HALF)[None, :]
    v = tl.load(v_ptrs, mask=is_key[:, None], other=0.0)
    dtype = v.dtype
    if WIDENS:
        k1, k2, v = k1.to(tl.float32), k2.to(tl.float32), v.to(tl.float32)
    logits = tl.dot(q1, k1.T, input_precision="ieee")
    logits = tl.dot(q2, k2.T, logits, input_precision="ieee")
    probabilities = tl.exp2(logits * (row_scale * scale)[:, None] - exponent[:, None])
    if MASKED:
        is_visible = (key + row)[None, :] <= tl.minimum(position, high - 1)[:, None]
        probabilities = tl.where(is_visible, probabilities, 0.0)
    of_probabilities = tl.dot(grad, v.T, input_precision="ieee")
    of_logits = (probabilities * (of_probabilities - delta[:, None])).to(dtype).to(v.dtype)
    dq1 = tl.dot(of_logits, k1, dq1, input_precision="ieee")
    dq2 = tl.dot(of_logits, k2, dq2, input_precision="ieee")
    return dq1, dq2


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dca_queries_backward_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, exponent_ptr, delta_ptr, logit_scale_ptr, dq_ptr,
    tiles_ptr, cu_q_ptr, cu_k_ptr, dq_copy, q_copy, q_batch, q_row, q_head, k_batch, k_row, k_head,
    v_batch, v_row, v_head, grad_batch, grad_row, grad_head,
    batch, rows_q, rows_k, query_start, key_start, first_tile, stride, per_chunk, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, FIRST_SEGMENT: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """Write dq of one tile and one head, per segment and not turned back; q holds a copy per segment."""
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
    grad_ptrs = grad_ptr + at * grad_batch + head * grad_head + first_row * grad_row
    grad_ptrs += row[:, None] * grad_row + tl.arange(0, 2 * HALF)[None, :]
    grad = tl.load(grad_ptrs, mask=is_row[:, None], other=0.0)
    if WIDENS:
        grad = grad.to(tl.float32)
    of_row = (at * HEADS + head) * rows_q + first_row + row
    exponent = tl.load(exponent_ptr + of_row, mask=is_row, other=float("inf"))
    delta = tl.load(delta_ptr + of_row, mask=is_row, other=0.0)
    row_scale = tl.full([BLOCK_QUERIES], 1.0, tl.float32)
    if logit_scale_ptr is not None:
        row_scale = tl.load(logit_scale_ptr + first_row + row, mask=is_row, other=1.0)
    base = ((at * rows_q + first_row) * HEADS + head) * (2 * HALF)
    offset = row[:, None] * (HEADS * 2 * HALF) + tl.arange(0, HALF)[None, :]
    factor = (row_scale * (scale * 0.6931471805599453))[:, None]
    for segment in range(FIRST_SEGMENT, 3):
        low, high, masked_from = keys_of_segment(
            segment, chunk_begin, begin, end, stride, q_start, key_start, key_end, BLOCK_KEYS
        )
        q1, q2 = load_halves(q_base + tl.cast(segment - FIRST_SEGMENT, tl.int64) * q_copy, row, q_row, is_row, HALF)
        if WIDENS:
            q1, q2 = q1.to(tl.float32), q2.to(tl.float32)
        dq1 = tl.zeros([BLOCK_QUERIES, HALF], tl.float32)
        dq2 = tl.zeros([BLOCK_QUERIES, HALF], tl.float32)
        for key in tl.range(low, masked_from, BLOCK_KEYS):
            dq1, dq2 = _add_to_queries(
                q1, q2, grad, dq1, dq2, row_scale, exponent, delta, position, k_base, v_base, k_row, v_row, key,
                high, scale, HALF, BLOCK_KEYS, False, WIDENS,
            )  # fmt: skip
        for key in tl.range(masked_from, high, BLOCK_KEYS, num_stages=1):
            dq1, dq2 = _add_to_queries(
                q1, q2, grad, dq1, dq2, row_scale, exponent, delta, position, k_base, v_base, k_row, v_row, key,
                high, scale, HALF, BLOCK_KEYS, True, WIDENS,
            )  # fmt: skip
        out = dq_ptr + tl.cast(segment - FIRST_SEGMENT, tl.int64) * dq_copy + base + offset
        tl.store(out, (dq1 * factor).to(dq_ptr.dtype.element_ty), mask=is_row[:, None])
        tl.store(out + HALF, (dq2 * factor).to(dq_ptr.dtype.element_ty), mask=is_row[:, None])


def launch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    request: AttentionRequest,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, contiguous; lse may be that of more keys than these (ring attention)."""
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    of_queries = tiles_of_queries(request, q, _blocks_of_queries(q)["BLOCK_QUERIES"]) if q.numel() else None
    of_keys = tiles_of_keys(request, k, _blocks_of_keys(q)["BLOCK_KEYS"]) if k.numel() else None
    heads_k = k.shape[-2]
    group, at_once = q.shape[-2] // heads_k, _key_heads_at_once(q, k, request, of_keys)
    for first in range(0, heads_k, at_once):
        part, shared = slice(first, first + at_once), slice(first * group, (first + at_once) * group)
        rows = [each[..., shared, :] for each in (grad, q, output, dq)]
        columns = [each[..., part, :] for each in (k, v, dk, dv)]
        _launch_heads(rows, columns, lse[..., shared, :].contiguous(), request, (of_queries, of_keys))
    return dq, dk, dv


def _key_heads_at_once(q: torch.Tensor, k: torch.Tensor, request: AttentionRequest, tiles: Tiles | None) -> int:
    """Return of how many key heads to hold copies of q and dq: the fewest whose tiles fill the device."""
    heads = k.shape[-2]
    if request.tables is None or tiles is None:
        return heads
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(q.device)
    return next(
        each for each in range(1, heads + 1) if heads % each == 0 and (each == heads or tiles.slots * each >= wanted)
    )


def _launch_heads(
    of_rows: list[torch.Tensor],
    of_keys: list[torch.Tensor],
    lse: torch.Tensor,
    request: AttentionRequest,
    tiles: tuple[Tiles | None, Tiles | None],
) -> None:
    """Write dq, dk and dv of some key heads, all on their query heads.

    of_rows: grad, q, output and dq; of_keys: k, v, dk and dv.
    """
    (grad, q, output, dq), (k, v, dk, dv) = of_rows, of_keys
    keys, queries = rotated_keys(k, request), rotated_queries(q, request)
    delta, exponent = torch.empty_like(lse), torch.empty_like(lse)
    boundaries = request.cu_seqlens or (None, None)
    given = (queries, keys, v, grad, exponent, delta, request.logit_scale)
    all_strides = (queries.stride(0), *strides(queries[0]), *strides(keys), *strides(v), *strides(grad))
    heads = q.shape[-2]
    common = {**constants(q, k, request), "scale": request.scale * math.log2(math.e)}
    if tiles[0] is not None:
        grid = (triton.cdiv(q.shape[-3], BLOCK_ROWS) * heads, 1 if q.dim() == 3 else q.shape[0])
        dca_delta_kernel[grid](
            grad, output, lse, delta, exponent, *strides(grad), *strides(output), q.shape[-3],
            HEADS=heads, SIZE=q.shape[-1], BLOCK_ROWS=BLOCK_ROWS, num_warps=4,
        )  # fmt: skip
        wide = dq.unsqueeze(0) if request.tables is None else torch.empty_like(queries, dtype=torch.float32)
        dca_queries_backward_kernel[(tiles[0].slots * heads,)](
            *given, wide, tiles[0].list_of_tiles, *boundaries, wide.stride(0), *all_strides,
            **numbers(q, k, request, tiles[0]), **common, **_blocks_of_queries(q),
        )  # fmt: skip
        if request.tables is not None:
            turn_queries_back(wide, dq, request)
        del wide  # before there is one for the keys
    if tiles[1] is not None:
        rotates = request.tables is not None and not request.keys_rotated
        wide = dk.new_empty(dk.shape, dtype=torch.float32) if rotates else dk
        dca_keys_backward_kernel[(tiles[1].slots * k.shape[-2],)](
            *given, wide, dv, tiles[1].list_of_tiles, *boundaries, *all_strides, **numbers(q, k, request, tiles[1]),
            **common, HEADS_DK=_heads_of_a_row(wide), HEADS_DV=_heads_of_a_row(dv), **_blocks_of_keys(q),
        )  # fmt: skip
        if rotates:
            turn_keys_back(wide, dk, request)


def _heads_of_a_row(heads: torch.Tensor) -> int:
    """Return how many heads lie between two rows: those of the tensor of which this may be a view."""
    return heads.stride(-3) // heads.shape[-1]


def _blocks_of_queries(q: torch.Tensor) -> dict[str, Any]:
    """Sizes of tiles and of programs for dq; see `kernel._blocks`."""
    is_wide = q.shape[-1] > 64
    if IS_INTERPRETED:
        # So small that short sequences have several.
        return {"BLOCK_QUERIES": 16, "BLOCK_KEYS": 16, "WIDENS": q.dtype == torch.bfloat16}
    if q.dtype == torch.float32:
        # With 32 keys heads of 128 numbers spilled 608 bytes on sm_90, in plain attention only.
        queries, keys, stages = (32, 16, 2) if is_wide else (64, 32, 2)
    elif is_before_hopper():
        queries, keys, stages = (64, 16, 2) if is_wide else (128, 32, 2)
    else:
        queries, keys, stages = 128, 64, 2
    return {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "num_warps": 8, "num_stages": stages, "WIDENS": False}


def _blocks_of_keys(q: torch.Tensor) -> dict[str, Any]:
    """Sizes of tiles and of programs for dk and dv, whose two sums stay in registers."""
    is_wide = q.shape[-1] > 64
    if IS_INTERPRETED:
        return {"BLOCK_QUERIES": 16, "BLOCK_KEYS": 16, "WIDENS": q.dtype == torch.bfloat16}
    if q.dtype == torch.float32:
        queries, keys, stages = 16 if is_wide else 32, 32, 2
    elif is_before_hopper():
        queries, keys, stages = (16, 64, 2) if is_wide else (32, 128, 2)
    else:
        queries, keys, stages = 32 if is_wide else 64, 128, 2
    sizes = {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "num_warps": 8, "num_stages": stages, "WIDENS": False}
    # In fp32 ptxas spills 24 bytes on sm_80, to keep to 128 registers; on sm_90 it spills as many with more to spend.
    return {**sizes, "maxnreg": 168} if q.dtype == torch.float32 and is_before_hopper() else sizes
