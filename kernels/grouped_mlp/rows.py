"""Kernels around the grouped GEMMs: the sum of a token's rows, and the gate of the shared expert.

Shapes: T tokens, R routed rows, H hidden size, k experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..column_sum import launch_column_sum, programs_of_first_stage

# 8 elements per thread: one 16-byte access of bf16.
BLOCK_COLUMNS = 1024
NUM_WARPS = 4


@triton.jit
def combine_kernel(
    rows_ptr, positions_ptr, shared_ptr, scale_ptr, vector_ptr, out_ptr, size, topk, SHARES: tl.constexpr,
    SCALES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out [T, H] = sum_j rows[positions[:, j]] + shared [T, H] if SHARES + scale [T] vector [H] if SCALES."""
    program = tl.program_id(0)
    column_blocks = tl.cdiv(size, BLOCK)
    token = (program // column_blocks).to(tl.int64)
    column = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(0, topk):
        position = tl.load(positions_ptr + token * topk + slot)
        total += tl.load(rows_ptr + position * size + column, mask=inside, other=0.0).to(tl.float32)
    if SHARES:
        total += tl.load(shared_ptr + token * size + column, mask=inside, other=0.0).to(tl.float32)
    if SCALES:
        vector = tl.load(vector_ptr + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(scale_ptr + token) * vector
    tl.store(out_ptr + token * size + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(x_ptr, vector_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Write out [T] = sigmoid(x vector); a program per token."""
    token = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * size + column, mask=column < size, other=0.0).to(tl.float32)
        total += x * tl.load(vector_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + token, tl.sigmoid(tl.sum(total, axis=0)))


@triton.jit
def gate_gradient_kernel(scale_ptr, x_ptr, partial_ptr, rows, rows_per_program, size, BLOCK: tl.constexpr):
    """Write a row of partial [programs, H]: the sum of scale [T] x [T, H] over this program's tokens."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for index in range(0, rows_per_program):
        row = program * rows_per_program + index
        inside = (column < size) & (row < rows)
        x = tl.load(x_ptr + row * size + column, mask=inside, other=0.0).to(tl.float32)
        total += x * tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    tl.store(partial_ptr + program * size + column, total, mask=column < size)


def launch_combine(
    rows: torch.Tensor,
    positions: torch.Tensor,
    shared: torch.Tensor | None,
    scale: torch.Tensor | None,
    vector: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Fill out [T, H] with the sum of each token's rows, of shared [T, H], and of scale [T] times vector [H]."""
    tokens, size = out.shape
    block = min(BLOCK_COLUMNS, triton.next_power_of_2(size))
    combine_kernel[(tokens * triton.cdiv(size, block),)](
        rows, positions, shared, scale, vector, out, size, positions.shape[1], SHARES=shared is not None,
        SCALES=scale is not None, BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip


def launch_gate(x: torch.Tensor, vector: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [T] fp32 with sigmoid(x vector) of x [T, H] and vector [H]."""
    block = min(BLOCK_COLUMNS, triton.next_power_of_2(x.shape[1]))
    gate_kernel[(x.shape[0],)](x, vector, out, x.shape[1], BLOCK=block, num_warps=NUM_WARPS)


def launch_gate_gradient(scale: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [H] with the sum over tokens of scale [T] fp32 times x [T, H], in a fixed order."""
    rows, size = x.shape
    rows_per_program = triton.cdiv(rows, programs_of_first_stage(rows, x.device))
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    block = min(BLOCK_COLUMNS, triton.next_power_of_2(size))
    gate_gradient_kernel[(programs, triton.cdiv(size, block))](
        scale, x, partial, rows, rows_per_program, size, BLOCK=block, num_warps=NUM_WARPS
    )
    launch_column_sum(partial, out)
