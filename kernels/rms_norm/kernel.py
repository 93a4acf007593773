"""RMSNorm in Triton: a row stays in registers between its one read and its one write; arithmetic in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..column_sum import launch_column_sum, programs_of_first_stage


@triton.jit
def rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, inverse_rms_ptr, hidden, x_stride, residual_stride, eps,
    ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write y and inverse_rms, and sum = x + residual if ADDS; a program per row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * hidden + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    y = x * inverse_rms * weight
    tl.store(y_ptr + row * hidden + column, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(inverse_rms_ptr + row, inverse_rms)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, inverse_rms_ptr, grad_x_ptr, partial_ptr, rows, rows_per_program, hidden,
    x_stride, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write grad_x (plus grad_sum if ADDS), and the weight's gradient over this program's rows to a row of partial."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    first = program * rows_per_program
    for index in range(0, rows_per_program):
        row = first + index
        inside_row = inside & (row < rows)
        grad = tl.load(grad_ptr + row * hidden + column, mask=inside_row, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside_row, other=0.0).to(tl.float32)
        inverse_rms = tl.load(inverse_rms_ptr + row, mask=row < rows, other=0.0)
        normal = x * inverse_rms
        grad_weight += grad * normal
        grad_normal = grad * weight
        projection = tl.sum(grad_normal * normal, axis=0) / hidden
        grad_x = (grad_normal - normal * projection) * inverse_rms
        if ADDS:
            grad_x += tl.load(grad_sum_ptr + row * hidden + column, mask=inside_row, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * hidden + column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside_row)
    tl.store(partial_ptr + program * hidden + column, grad_weight, mask=inside)


def launch_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    y: torch.Tensor,
    total: torch.Tensor | None,
    inverse_rms: torch.Tensor,
) -> None:
    """Fill y [N, H], inverse_rms [N] fp32 and, with a residual [N, H], total [N, H] = x + residual.

    x and residual may have any row stride; the rest is contiguous. N and H are positive.
    """
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    residual_stride = 0 if residual is None else residual.stride(0)
    rms_norm_forward_kernel[(rows,)](
        x, residual, weight, y, total, inverse_rms, hidden, x.stride(0), residual_stride, eps,
        ADDS=residual is not None, BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip


def launch_backward(
    grad: torch.Tensor,
    grad_sum: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    inverse_rms: torch.Tensor,
    grad_x: torch.Tensor,
    grad_weight: torch.Tensor,
) -> None:
    """Fill grad_x [N, H] and grad_weight [H] in two launches; x may have any row stride, the rest is contiguous."""
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    rows_per_program = triton.cdiv(rows, programs_of_first_stage(rows, x.device))
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
    rms_norm_backward_kernel[(programs,)](
        grad, grad_sum, x, weight, inverse_rms, grad_x, partial, rows, rows_per_program, hidden, x.stride(0),
        ADDS=grad_sum is not None, BLOCK=block, num_warps=_num_warps(block),
        maxnreg=_backward_registers(x, block),
    )  # fmt: skip
    launch_column_sum(partial, grad_weight)


def _backward_registers(x: torch.Tensor, block: int) -> int | None:
    """`maxnreg` of backward: without it ptxas goes from 64 to 48 on sm_80, and spills for that at 0.5B.

    Rows that are no multiple of 16 bytes take an address per element, which does not fit 64.
    """
    is_wide = x.shape[1] * x.element_size() % 16 == 0
    return 64 if is_wide and block <= 256 * _num_warps(block) else None


def _num_warps(block: int) -> int:
    """8 elements per thread, one 16-byte access of bf16, up to 16 warps; longer rows get more per thread."""
    return min(16, max(1, block // 256))
