"""Routing in Triton: a block of rows of logits stays in registers from the softmax to the sums over tokens.

Sums over tokens take two stages: a row of partial sums per program, then one program that adds them in a fixed order
and turns counts into offsets. No atomics, no host.

Shapes: T tokens, E experts, k experts per token, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..column_sum import programs_of_first_stage

# One warp's reductions over 64 experts need no shared memory; a block holds this many logits.
BLOCK_LOGITS = 2048
FINISH_ROWS = 32


@triton.jit
def _order_of(logits, expert, BLOCK_EXPERTS: tl.constexpr):
    """Return int64 keys that sort like (logit, -expert), all different; zeros of both signs are one, NaN is largest."""
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    ordered = tl.where(logits != logits, 0x7FFFFFFF, ordered).to(tl.int64)
    return ordered * BLOCK_EXPERTS + (BLOCK_EXPERTS - 1 - expert)


@triton.jit
def routing_forward_kernel(
    logits_ptr, weights_ptr, experts_ptr, count_ptr, sum_ptr, rows, rows_per_program, num_experts, topk, logits_stride,
    RENORMALIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write weights and experts [T, k], and this program's row of counts [P, E] and of sums [P, E + 1] (p, then z)."""
    program = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_EXPERTS)
    real = (expert < num_experts)[None, :]
    counts = tl.zeros([BLOCK_EXPERTS], tl.int32)
    sums = tl.zeros([BLOCK_EXPERTS], tl.float32)
    z_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    begin = program * rows_per_program
    for first in range(0, rows_per_program, BLOCK_ROWS):
        within = first + tl.arange(0, BLOCK_ROWS)
        row = begin + within
        here = (within < rows_per_program) & (row < rows)
        inside = here[:, None] & real
        logits = tl.load(logits_ptr + row[:, None] * logits_stride + expert[None, :], mask=inside, other=0.0)
        logits = tl.where(real, logits.to(tl.float32), float("-inf"))
        largest = tl.max(logits, axis=1)
        exps = tl.exp(logits - largest[:, None])
        total = tl.sum(exps, axis=1)
        probs = exps / total[:, None]
        lse = largest + tl.log(total)
        key = tl.where(real, _order_of(logits, expert[None, :], BLOCK_EXPERTS), -(1 << 62))
        rank = tl.full([BLOCK_ROWS, BLOCK_EXPERTS], BLOCK_EXPERTS, tl.int32)
        for slot in range(0, topk):
            best = key == tl.max(key, axis=1)[:, None]
            rank = tl.where(best, slot, rank)
            key = tl.where(best, -(1 << 62), key)
        chosen = (rank < topk) & inside
        weights = probs
        if RENORMALIZE:
            weights = probs / tl.sum(tl.where(rank < topk, probs, 0.0), axis=1)[:, None]
        at = row[:, None] * topk + rank
        tl.store(weights_ptr + at, weights, mask=chosen)
        tl.store(experts_ptr + at, expert[None, :].to(tl.int64) + tl.zeros_like(at), mask=chosen)
        counts += tl.sum(chosen.to(tl.int32), axis=0)
        sums += tl.sum(tl.where(inside, probs, 0.0), axis=0)
        z_sum += tl.where(here, lse * lse, 0.0)
    tl.store(count_ptr + program * num_experts + expert, counts, mask=expert < num_experts)
    tl.store(sum_ptr + program * (num_experts + 1) + expert, sums, mask=expert < num_experts)
    tl.store(sum_ptr + program * (num_experts + 1) + num_experts, tl.sum(z_sum, axis=0))


@triton.jit
def routing_finish_kernel(
    count_ptr, sum_ptr, counts_ptr, offsets_ptr, sums_ptr, z_ptr, programs, num_experts,
    BLOCK_ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Add the partial rows: counts [E], offsets [E + 1], sums [E] and z; one program."""
    expert = tl.arange(0, BLOCK_EXPERTS)
    row = tl.arange(0, BLOCK_ROWS)
    real = expert < num_experts
    counts = tl.zeros([BLOCK_ROWS, BLOCK_EXPERTS], tl.int64)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_EXPERTS], tl.float32)
    z_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, programs, BLOCK_ROWS):
        here = (first + row).to(tl.int64)
        inside = (here < programs)[:, None] & real[None, :]
        counts += tl.load(count_ptr + here[:, None] * num_experts + expert[None, :], mask=inside, other=0).to(tl.int64)
        sum_row = sum_ptr + here * (num_experts + 1)
        sums += tl.load(sum_row[:, None] + expert[None, :], mask=inside, other=0.0)
        z_sum += tl.load(sum_row + num_experts, mask=here < programs, other=0.0)
    count = tl.sum(counts, axis=0)
    tl.store(counts_ptr + expert, count, mask=real)
    tl.store(offsets_ptr, tl.zeros([], tl.int64))
    tl.store(offsets_ptr + 1 + expert, tl.cumsum(count, axis=0), mask=real)
    tl.store(sums_ptr + expert, tl.sum(sums, axis=0), mask=real)
    tl.store(z_ptr, tl.sum(z_sum, axis=0))


@triton.jit
def routing_backward_kernel(
    grad_weights_ptr, grad_sums_ptr, grad_z_ptr, logits_ptr, experts_ptr, grad_logits_ptr, rows, num_experts, topk,
    logits_stride, RENORMALIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write grad_logits [T, E]; a program per block of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    expert = tl.arange(0, BLOCK_EXPERTS)
    here = row < rows
    real = expert < num_experts
    inside = here[:, None] & real[None, :]
    logits = tl.load(logits_ptr + row[:, None] * logits_stride + expert[None, :], mask=inside, other=0.0)
    logits = tl.where(real[None, :], logits.to(tl.float32), float("-inf"))
    largest = tl.max(logits, axis=1)
    exps = tl.exp(logits - largest[:, None])
    total = tl.sum(exps, axis=1)
    probs = exps / total[:, None]
    lse = largest + tl.log(total)
    grad = tl.zeros([BLOCK_ROWS, BLOCK_EXPERTS], tl.float32)
    chosen = tl.zeros([BLOCK_ROWS, BLOCK_EXPERTS], tl.int1)
    for slot in range(0, topk):
        at = row * topk + slot
        this = expert[None, :] == tl.load(experts_ptr + at, mask=here, other=0)[:, None]
        grad = tl.where(this, tl.load(grad_weights_ptr + at, mask=here, other=0.0)[:, None], grad)
        chosen = chosen | this
    if RENORMALIZE:
        share = tl.sum(tl.where(chosen, probs, 0.0), axis=1)
        mean = tl.sum(tl.where(chosen, grad * probs, 0.0), axis=1) / share
        grad = tl.where(chosen, (grad - mean[:, None]) / share[:, None], 0.0)
    grad += tl.load(grad_sums_ptr + expert, mask=real, other=0.0)[None, :]
    inner = tl.sum(probs * grad, axis=1)
    grad_logits = probs * (grad - inner[:, None] + 2.0 * tl.load(grad_z_ptr) * lse[:, None])
    out = grad_logits_ptr + row[:, None] * num_experts + expert[None, :]
    tl.store(out, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=inside)


def launch_forward(
    logits: torch.Tensor,
    renormalize: bool,
    weights: torch.Tensor,
    experts: torch.Tensor,
    counts: torch.Tensor,
    offsets: torch.Tensor,
    sums: torch.Tensor,
    z_sum: torch.Tensor,
) -> None:
    """Fill the results of `reference.forward` in two launches; logits [T, E] may have any row stride, T is positive."""
    rows, num_experts = logits.shape
    block_experts, block_rows = _blocks(num_experts)
    rows_per_program = triton.cdiv(rows, programs_of_first_stage(triton.cdiv(rows, block_rows), logits.device))
    programs = triton.cdiv(rows, rows_per_program)
    partial_counts = torch.empty(programs, num_experts, dtype=torch.int32, device=logits.device)
    partial_sums = torch.empty(programs, num_experts + 1, dtype=torch.float32, device=logits.device)
    routing_forward_kernel[(programs,)](
        logits, weights, experts, partial_counts, partial_sums, rows, rows_per_program, num_experts, weights.shape[1],
        logits.stride(0), RENORMALIZE=renormalize, BLOCK_ROWS=block_rows, BLOCK_EXPERTS=block_experts,
    )  # fmt: skip
    routing_finish_kernel[(1,)](
        partial_counts, partial_sums, counts, offsets, sums, z_sum, programs, num_experts,
        BLOCK_ROWS=FINISH_ROWS, BLOCK_EXPERTS=block_experts,
    )  # fmt: skip


def launch_backward(
    grad_weights: torch.Tensor,
    grad_sums: torch.Tensor,
    grad_z: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    renormalize: bool,
    grad_logits: torch.Tensor,
) -> None:
    """Fill grad_logits [T, E]; logits may have any row stride, the rest is contiguous."""
    rows, num_experts = logits.shape
    block_experts, block_rows = _blocks(num_experts)
    routing_backward_kernel[(triton.cdiv(rows, block_rows),)](
        grad_weights, grad_sums, grad_z, logits, experts, grad_logits, rows, num_experts, experts.shape[1],
        logits.stride(0), RENORMALIZE=renormalize, BLOCK_ROWS=block_rows, BLOCK_EXPERTS=block_experts,
    )  # fmt: skip


def _blocks(num_experts: int) -> tuple[int, int]:
    """Columns that hold all experts, and rows of a block."""
    columns = max(16, triton.next_power_of_2(num_experts))
    return columns, max(1, BLOCK_LOGITS // columns)
