"""How the Triton kernels cut sequences into tiles and segments, and rotate heads.

A tile is a range of positions inside one chunk, so that its rows meet the same three segments of keys: older chunks,
the previous one, their own (see `layout.py`). Tiles are numbered along the positions: chunk n has tiles n per_chunk ...
(n + 1) per_chunk - 1, the last of them shorter where the tile does not divide L. Plain attention is one chunk of
LONGEST tokens. Each tile is one program, those with most work first; packed sequences have a list of their tiles,
sorted on the device, so that the host need not know their lengths.

Shapes: B sequences, T tokens of packed ones, S tokens of a row, H heads, D = 2 HALF head size.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from .request import AttentionRequest
from .tile_lists import LONGEST, Tiles, stride_of

# The interpreter multiplies bf16 as the integers it holds them in; a device must get 16 bits for its tensor cores.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTER, SUCC, INTRA = (tl.constexpr(index) for index in range(3))
# A size of 1 would become a Python constant, which has no dtype.
UNSPECIALIZED = ("query_start", "key_start", "rows_q", "rows_k", "first_tile", "table_rows")


@triton.jit
def floor_div(x, divisor):
    """Round towards minus infinity; Triton's // rounds towards 0."""
    return tl.where(x < 0, -((divisor - 1 - x) // divisor), x // divisor)


@triton.jit
def locate(
    slot, tiles_ptr, cu_q_ptr, cu_k_ptr, batch, rows_q, rows_k, query_start, first_tile,
    STEP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return batch index (-1: no tile), tile, and of its sequence: first row and length of q and k, first position."""
    if PACKED:
        sequence = tl.load(tiles_ptr + 2 * slot)
        tile = tl.load(tiles_ptr + 2 * slot + 1)
        at = tl.maximum(sequence, 0)
        q_begin, q_end = tl.load(cu_q_ptr + at).to(tl.int64), tl.load(cu_q_ptr + at + 1).to(tl.int64)
        k_begin, k_end = tl.load(cu_k_ptr + at).to(tl.int64), tl.load(cu_k_ptr + at + 1).to(tl.int64)
        q_len, k_len = (q_end - q_begin).to(tl.int32), (k_end - k_begin).to(tl.int32)
        return tl.minimum(sequence, 0), tile, q_begin, q_len, k_begin, k_len, k_len - q_len
    none = tl.zeros([], tl.int64)
    return slot % batch, first_tile + STEP * (slot // batch), none, rows_q, none, rows_k, query_start


@triton.jit
def tile_range(tile, stride, per_chunk, start, length, BLOCK: tl.constexpr):
    """Return the first position of the tile's chunk, and the tile's first position and the one behind its last."""
    chunk = floor_div(tile, per_chunk)
    chunk_begin = chunk * stride
    begin = chunk_begin + (tile - chunk * per_chunk) * BLOCK
    return chunk_begin, begin, tl.minimum(tl.minimum(begin + BLOCK, chunk_begin + stride), start + length)


@triton.jit
def locate_rows(
    tiles_ptr, cu_q_ptr, cu_k_ptr, batch, rows_q, rows_k, query_start, key_start, first_tile, stride, per_chunk,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACKED: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """Return what a program for a tile of queries and a head has to do.

    head and its key head; batch index (-1: no tile); rows of q and, of position 0, of k in the batch; first position
    of the sequence's queries, the one behind its last key; tile_range.
    """
    head = tl.program_id(0) % HEADS
    index, tile, q_begin, q_len, k_begin, k_len, q_start = locate(
        tl.program_id(0) // HEADS, tiles_ptr, cu_q_ptr, cu_k_ptr, batch, rows_q, rows_k, query_start, first_tile,
        -1, PACKED,
    )  # fmt: skip
    chunk_begin, begin, end = tile_range(tile, stride, per_chunk, q_start, q_len, BLOCK_QUERIES)
    first_row, first_key = q_begin + (begin - q_start), k_begin - key_start
    head, head_k, index = head.to(tl.int64), (head // GROUP).to(tl.int64), index.to(tl.int64)
    return head, head_k, index, first_row, first_key, q_start, key_start + k_len, chunk_begin, begin, end


@triton.jit
def keys_of_segment(
    segment, chunk_begin, begin, end, stride, query_start, key_start, key_end, BLOCK_KEYS: tl.constexpr
):  # fmt: skip
    """Return the range of keys a tile of queries meets in a segment, and where blocks that need a mask begin."""
    low = tl.where(segment == INTER, key_start, tl.where(segment == SUCC, chunk_begin - stride, chunk_begin))
    low = tl.maximum(low, key_start)
    high = tl.where(segment == INTER, chunk_begin - stride, tl.where(segment == SUCC, chunk_begin, end))
    high = tl.minimum(high, key_end)
    # Below the diagonal.
    unmasked = tl.where(segment == INTRA, tl.minimum(high, tl.maximum(begin, query_start) + 1), high)
    return low, high, low + tl.maximum(unmasked - low, 0) // BLOCK_KEYS * BLOCK_KEYS


@triton.jit
def query_position(segment, within, stride, cap, inter):
    """Return the positions at which rows `within` their chunk are rotated for the keys of a segment."""
    succ = tl.minimum(within + stride, cap)
    return tl.where(segment == INTER, inter, tl.where(segment == SUCC, succ, within))


@triton.jit
def load_angles(cos_ptr, sin_ptr, position, table_rows, HALF: tl.constexpr):
    """Return cos and sin [rows, HALF] of positions [rows]; NaN outside the tables."""
    column = tl.arange(0, HALF)[None, :]
    known = (position >= 0) & (position < table_rows)
    offset = position[:, None] * HALF + column
    cos = tl.load(cos_ptr + offset, mask=known[:, None], other=float("nan"))
    return cos, tl.load(sin_ptr + offset, mask=known[:, None], other=float("nan"))


@triton.jit
def load_halves(base, row, stride, is_row, HALF: tl.constexpr):
    """Return both halves [rows, HALF] of the heads at base + row stride; 0 for rows that are none."""
    offset = row[:, None] * stride + tl.arange(0, HALF)[None, :]
    first = tl.load(base + offset, mask=is_row[:, None], other=0.0)
    return first, tl.load(base + HALF + offset, mask=is_row[:, None], other=0.0)


@triton.jit
def load_queries(
    base, row, stride, is_row, cos_ptr, sin_ptr, position, table_rows, HALF: tl.constexpr, ROTATES: tl.constexpr,
    WIDENS: tl.constexpr,
):  # fmt: skip
    """Return both halves of rows of q, rotated and rounded; in halves, as whole heads and tables fill registers."""
    first, second = load_halves(base, row, stride, is_row, HALF)
    if ROTATES:
        cos, sin = load_angles(cos_ptr, sin_ptr, position, table_rows, HALF)
        x1, x2 = first.to(tl.float32), second.to(tl.float32)
        first, second = (x1 * cos - x2 * sin).to(first.dtype), (x2 * cos + x1 * sin).to(second.dtype)
    if WIDENS:
        return first.to(tl.float32), second.to(tl.float32)
    return first, second


def numbers(q: torch.Tensor, k: torch.Tensor, request: AttentionRequest, tiles: Tiles) -> dict[str, int]:
    """Return the arguments of a launch that may differ from call to call."""
    return {
        "batch": 1 if q.dim() == 3 else q.shape[0],
        "rows_q": q.shape[-3],
        "rows_k": k.shape[-3],
        "query_start": request.query_start,
        "key_start": request.key_start,
        "first_tile": tiles.first_tile,
        "stride": stride_of(request),
        "per_chunk": tiles.per_chunk,
    }


def rotations(request: AttentionRequest) -> dict[str, int]:
    """Return the arguments of a launch that rotates queries."""
    chunks = request.chunks
    return {
        "table_rows": request.tables[0].shape[0] if request.tables else 0,
        "cap": LONGEST if chunks is None else chunks.limit,
        "inter": 0 if chunks is None else chunks.inter_position,
    }


def constants(q: torch.Tensor, k: torch.Tensor, request: AttentionRequest) -> dict[str, int | bool]:
    """Return the compile-time arguments of a launch, but for the sizes of tiles."""
    return {
        "HEADS": q.shape[-2],
        "GROUP": q.shape[-2] // k.shape[-2],
        "HALF": q.shape[-1] // 2,
        "FIRST_SEGMENT": 2 if request.chunks is None else 0,
        "PACKED": request.cu_seqlens is not None,
    }


def is_before_hopper() -> bool:
    """Return whether the device lacks products of whole warp groups, which read their operands from shared memory."""
    return driver.active.get_current_target().arch < 90  # type: ignore[no-any-return]
