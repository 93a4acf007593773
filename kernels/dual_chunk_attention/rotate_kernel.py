"""Rotated copies of keys and queries in Triton: one read, one write per copy, arithmetic in fp32, rounded once.

Shapes: T tokens, H heads, D = 2 HALF head size, V copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .request import AttentionRequest
from .tile_lists import positions_of_keys, positions_of_queries, stride_of, strides
from .tiles import floor_div, load_angles, load_halves, query_position, rotations

BLOCK_ROWS = 32


@triton.jit
def _within(positions_ptr, first_row, row, is_row, start, stride):
    """Return how far into their chunk rows first_row + row are."""
    if positions_ptr is None:
        position = start + first_row.to(tl.int32) + row
    else:
        position = tl.load(positions_ptr + first_row + row, mask=is_row, other=0).to(tl.int32)
    # Rows before position 0 meet no keys: any angle of the tables will do.
    return tl.where(position < 0, 0, position - floor_div(position, stride) * stride)


@triton.jit(do_not_specialize=("rows", "start", "table_rows"))
def rotate_heads_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, out_ptr, x_batch, x_row, x_head, rows, start, table_rows, stride, cap,
    inter, HEADS: tl.constexpr, HALF: tl.constexpr, FIRST_SEGMENT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Write out [3 - FIRST_SEGMENT, batch, rows, HEADS, D], contiguous: rows as each segment of keys wants them.

    A program has BLOCK_ROWS rows of a head; the grid is blocks times heads, and the batch.
    """
    head = tl.program_id(0) % HEADS
    first_row = (tl.program_id(0) // HEADS).to(tl.int64) * BLOCK_ROWS
    index = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    is_row = first_row + row < rows
    x_base = x_ptr + index * x_batch + head.to(tl.int64) * x_head + first_row * x_row
    first, second = load_halves(x_base, row, x_row, is_row, HALF)
    x1, x2 = first.to(tl.float32), second.to(tl.float32)
    within = _within(positions_ptr, first_row, row, is_row, start, stride)
    size = tl.num_programs(1).to(tl.int64) * rows
    for segment in tl.static_range(FIRST_SEGMENT, 3):
        angle = query_position(segment, within, stride, cap, inter)
        cos, sin = load_angles(cos_ptr, sin_ptr, angle, table_rows, HALF)
        copy = (segment - FIRST_SEGMENT) * size + index * rows + first_row
        out = out_ptr + (copy * HEADS + head) * (2 * HALF)
        offset = row[:, None] * (HEADS * 2 * HALF) + tl.arange(0, HALF)[None, :]
        tl.store(out + offset, (x1 * cos - x2 * sin).to(out_ptr.dtype.element_ty), mask=is_row[:, None])
        tl.store(out + offset + HALF, (x2 * cos + x1 * sin).to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit(do_not_specialize=("rows", "start", "table_rows"))
def rotate_back_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, out_ptr, out_batch, out_row, out_head, rows, start, table_rows, stride,
    cap, inter, HEADS: tl.constexpr, HALF: tl.constexpr, FIRST_SEGMENT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Write out [batch, rows, HEADS, D], the sum over segments of contiguous x [3 - FIRST_SEGMENT, ...] turned back."""
    head = tl.program_id(0) % HEADS
    first_row = (tl.program_id(0) // HEADS).to(tl.int64) * BLOCK_ROWS
    index = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    is_row = first_row + row < rows
    within = _within(positions_ptr, first_row, row, is_row, start, stride)
    size = tl.num_programs(1).to(tl.int64) * rows
    y1 = tl.zeros([BLOCK_ROWS, HALF], tl.float32)
    y2 = tl.zeros([BLOCK_ROWS, HALF], tl.float32)
    for segment in tl.static_range(FIRST_SEGMENT, 3):
        copy = (segment - FIRST_SEGMENT) * size + index * rows + first_row
        x1, x2 = load_halves(x_ptr + (copy * HEADS + head) * (2 * HALF), row, HEADS * 2 * HALF, is_row, HALF)
        angle = query_position(segment, within, stride, cap, inter)
        cos, sin = load_angles(cos_ptr, sin_ptr, angle, table_rows, HALF)
        y1, y2 = y1 + x1 * cos + x2 * sin, y2 + x2 * cos - x1 * sin
    out = out_ptr + index * out_batch + head.to(tl.int64) * out_head + first_row * out_row
    out += row[:, None] * out_row + tl.arange(0, HALF)[None, :]
    tl.store(out, y1.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.store(out + HALF, y2.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


def rotated_keys(k: torch.Tensor, request: AttentionRequest) -> torch.Tensor:
    """Return k rotated once, at j mod L; k itself where that is done, or not wanted."""
    if request.tables is None or request.keys_rotated:
        return k
    return _rotated(k, request, positions_of_keys(request, k), request.key_start, copies=1)[0]


def rotated_queries(q: torch.Tensor, request: AttentionRequest) -> torch.Tensor:
    """Return q as each segment of keys wants it, [3, ...]; [1, ...] in plain attention; q [1, ...] if not rotated."""
    if request.tables is None:
        return q.unsqueeze(0)
    copies = 1 if request.chunks is None else 3
    return _rotated(q, request, positions_of_queries(request, q), request.query_start, copies)


def turn_keys_back(grad: torch.Tensor, out: torch.Tensor, request: AttentionRequest) -> None:
    """Write the gradient of k, like k at any strides, from that of the rotated keys, contiguous."""
    _turn_back(grad.unsqueeze(0), out, request, positions_of_keys(request, out), request.key_start)


def turn_queries_back(grads: torch.Tensor, out: torch.Tensor, request: AttentionRequest) -> None:
    """Write the gradient of q, like q at any strides, from those of `rotated_queries`, contiguous."""
    _turn_back(grads, out, request, positions_of_queries(request, out), request.query_start)


def _rotated(
    x: torch.Tensor, request: AttentionRequest, positions: torch.Tensor | None, start: int, copies: int
) -> torch.Tensor:
    out = x.new_empty((copies, *x.shape))
    if x.numel():
        x_batch, x_row, x_head = strides(x)
        rotate_heads_kernel[_grid(x)](
            x, *(request.tables or ()), positions, out, x_batch, x_row, x_head, x.shape[-3], start,
            **_numbers(x, request, copies),
        )  # fmt: skip
    return out


def _turn_back(
    grads: torch.Tensor, out: torch.Tensor, request: AttentionRequest, positions: torch.Tensor | None, start: int
) -> None:
    rotate_back_kernel[_grid(out)](
        grads, *(request.tables or ()), positions, out, *strides(out), out.shape[-3], start,
        **_numbers(out, request, grads.shape[0]),
    )  # fmt: skip


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[-3], BLOCK_ROWS) * x.shape[-2], 1 if x.dim() == 3 else x.shape[0]


def _numbers(x: torch.Tensor, request: AttentionRequest, copies: int) -> dict[str, int]:
    return {
        **rotations(request),
        "stride": stride_of(request),
        "HEADS": x.shape[-2],
        "HALF": x.shape[-1] // 2,
        "FIRST_SEGMENT": 3 - copies,
        "BLOCK_ROWS": BLOCK_ROWS,
        "num_warps": 4,
    }
