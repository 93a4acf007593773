"""Expert order in Triton: a counting sort in three launches, and gathers that move whole rows.

The sort counts each block of tokens, adds the counts up over blocks, and gives every choice its row: no atomics, and
equal experts keep the order of their tokens.

Shapes: T tokens, E experts, k experts per token, R = T k, H hidden size, B blocks of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Tokens of a block times experts: what a program holds.
BLOCK_CHOICES = 2048
SCAN_ROWS = 32
# 8 elements per thread: one 16-byte access of bf16.
BLOCK_COLUMNS = 1024
NUM_WARPS = 4


@triton.jit
def order_count_kernel(
    experts_ptr, count_ptr, tokens, topk, num_experts, BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr
):
    """Write counts [B, E] of this block of experts [T, k]."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    seen = tl.zeros([BLOCK_TOKENS, BLOCK_EXPERTS], tl.int32)
    for slot in range(0, topk):
        chosen = tl.load(experts_ptr + token * topk + slot, mask=token < tokens, other=-1)
        seen += (chosen[:, None] == expert[None, :]).to(tl.int32)
    tl.store(count_ptr + block * num_experts + expert, tl.sum(seen, axis=0), mask=expert < num_experts)


@triton.jit
def order_scan_kernel(
    count_ptr, begin_ptr, offsets_ptr, blocks, num_experts, BLOCK_ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr
):
    """Write offsets [E + 1], and begin [B, E]: the first row of each block within its expert; one program."""
    expert = tl.arange(0, BLOCK_EXPERTS)
    row = tl.arange(0, BLOCK_ROWS)
    running = tl.zeros([BLOCK_EXPERTS], tl.int64)
    for first in range(0, blocks, BLOCK_ROWS):
        here = (first + row).to(tl.int64)[:, None]
        inside = (here < blocks) & (expert < num_experts)[None, :]
        at = here * num_experts + expert[None, :]
        counts = tl.load(count_ptr + at, mask=inside, other=0).to(tl.int64)
        tl.store(begin_ptr + at, running[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        running += tl.sum(counts, axis=0)
    tl.store(offsets_ptr, tl.zeros([], tl.int64))
    tl.store(offsets_ptr + 1 + expert, tl.cumsum(running, axis=0), mask=expert < num_experts)


@triton.jit
def order_place_kernel(
    experts_ptr, begin_ptr, offsets_ptr, source_ptr, positions_ptr, tokens, topk, num_experts,
    BLOCK_TOKENS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write positions [T, k] and source [R] of this block of tokens."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    real = expert < num_experts
    here = token < tokens
    counts = tl.zeros([BLOCK_TOKENS, BLOCK_EXPERTS], tl.int32)
    for slot in range(0, topk):
        chosen = tl.load(experts_ptr + token * topk + slot, mask=here, other=-1)
        counts += (chosen[:, None] == expert[None, :]).to(tl.int32)
    begin = tl.load(begin_ptr + block * num_experts + expert, mask=real, other=0)
    begin += tl.load(offsets_ptr + expert, mask=real, other=0)
    next_row = begin[None, :] + (tl.cumsum(counts, axis=0) - counts).to(tl.int64)
    for slot in range(0, topk):
        at = token * topk + slot
        chosen = tl.load(experts_ptr + at, mask=here, other=-1)
        this = chosen[:, None] == expert[None, :]
        position = tl.sum(tl.where(this, next_row, 0), axis=1)
        tl.store(positions_ptr + at, position, mask=here)
        tl.store(source_ptr + position, at, mask=here)
        next_row += this.to(tl.int64)


@triton.jit
def gather_kernel(
    x_ptr, source_ptr, weights_ptr, out_ptr, hidden, topk, x_stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write out [R, H] = x[source // k], times weights[source] if WEIGHTED; the grid is R times the column blocks."""
    program = tl.program_id(0)
    column_blocks = tl.cdiv(hidden, BLOCK)
    row = (program // column_blocks).to(tl.int64)
    column = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + row)
    x = tl.load(x_ptr + (source // topk) * x_stride + column, mask=column < hidden, other=0.0)
    if WEIGHTED:
        x = x.to(tl.float32) * tl.load(weights_ptr + source)
    tl.store(out_ptr + row * hidden + column, x.to(out_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def gather_sum_kernel(
    y_ptr, positions_ptr, weights_ptr, out_ptr, hidden, topk, y_stride, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write out [T, H] = sum_j y[positions[:, j]], weighted if WEIGHTED; the grid is T times the column blocks."""
    program = tl.program_id(0)
    column_blocks = tl.cdiv(hidden, BLOCK)
    token = (program // column_blocks).to(tl.int64)
    column = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(0, topk):
        position = tl.load(positions_ptr + token * topk + slot)
        y = tl.load(y_ptr + position * y_stride + column, mask=column < hidden, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + token * topk + slot)
        total += y
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=column < hidden)


@triton.jit
def weight_gradient_kernel(
    grad_ptr, y_ptr, positions_ptr, out_ptr, hidden, topk, grad_stride, y_stride, BLOCK: tl.constexpr
):
    """Write out [T, k] = grad[t] . y[positions[t, j]]; a program per choice."""
    choice = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    grad_row = grad_ptr + (choice // topk) * grad_stride
    y_row = y_ptr + tl.load(positions_ptr + choice) * y_stride
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, hidden, BLOCK):
        inside = first + column < hidden
        grad = tl.load(grad_row + first + column, mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(y_row + first + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + choice, tl.sum(total, axis=0))


def launch_order(experts: torch.Tensor, source: torch.Tensor, positions: torch.Tensor, offsets: torch.Tensor) -> None:
    """Fill source [R], positions [T, k] and offsets [E + 1] of experts [T, k]; all contiguous int64, R positive."""
    tokens, topk = experts.shape
    num_experts = offsets.shape[0] - 1
    block_experts = max(16, triton.next_power_of_2(num_experts))
    block_tokens = max(1, BLOCK_CHOICES // block_experts)
    blocks = triton.cdiv(tokens, block_tokens)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=experts.device)
    begin = torch.empty(blocks, num_experts, dtype=torch.int64, device=experts.device)
    sizes = {"BLOCK_TOKENS": block_tokens, "BLOCK_EXPERTS": block_experts}
    order_count_kernel[(blocks,)](experts, counts, tokens, topk, num_experts, **sizes)
    order_scan_kernel[(1,)](
        counts, begin, offsets, blocks, num_experts, BLOCK_ROWS=SCAN_ROWS, BLOCK_EXPERTS=block_experts
    )
    order_place_kernel[(blocks,)](experts, begin, offsets, source, positions, tokens, topk, num_experts, **sizes)


def launch_gather(
    x: torch.Tensor, source: torch.Tensor, topk: int, weights: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Fill out [R, H], contiguous, as `reference.gather`; x may have any row stride, R and H are positive."""
    rows, hidden = out.shape
    block = min(BLOCK_COLUMNS, triton.next_power_of_2(hidden))
    gather_kernel[(rows * triton.cdiv(hidden, block),)](
        x, source, weights, out, hidden, topk, x.stride(0), WEIGHTED=weights is not None, BLOCK=block,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def launch_gather_sum(
    y: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Fill out [T, H], contiguous, as `reference.gather_sum`; y may have any row stride, T and H are positive."""
    tokens, hidden = out.shape
    block = min(BLOCK_COLUMNS, triton.next_power_of_2(hidden))
    gather_sum_kernel[(tokens * triton.cdiv(hidden, block),)](
        y, positions, weights, out, hidden, positions.shape[1], y.stride(0), WEIGHTED=weights is not None, BLOCK=block,
        num_warps=NUM_WARPS,
    )  # fmt: skip


def launch_weight_gradient(grad: torch.Tensor, y: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [T, k], contiguous fp32, as `reference.weight_gradient`; grad and y may have any row stride."""
    hidden = y.shape[1]
    block = min(BLOCK_COLUMNS, triton.next_power_of_2(hidden))
    weight_gradient_kernel[(out.numel(),)](
        grad, y, positions, out, hidden, positions.shape[1], grad.stride(0), y.stride(0), BLOCK=block,
        num_warps=NUM_WARPS,
    )  # fmt: skip
