"""SwiGLU in Triton: one program per row and block of columns, fp32 arithmetic, one read and one write of each byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# 8 elements per thread: one 16-byte access of bf16 per operand, and enough threads to cover the latency of memory.
BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def swiglu_forward_kernel(packed_ptr, out_ptr, width, packed_stride, BLOCK: tl.constexpr):
    """Write out [N, F] of packed [N, 2F]; the grid is N times the column blocks."""
    program = tl.program_id(0)
    column_blocks = tl.cdiv(width, BLOCK)
    row = (program // column_blocks).to(tl.int64)
    columns = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_ptr = packed_ptr + row * packed_stride + columns
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, packed_ptr, grad_packed_ptr, width, grad_stride, packed_stride, BLOCK: tl.constexpr
):
    """Write grad_packed [N, 2F] of grad [N, F] and packed [N, 2F]; the grid is as in forward."""
    program = tl.program_id(0)
    column_blocks = tl.cdiv(width, BLOCK)
    row = (program // column_blocks).to(tl.int64)
    columns = (program % column_blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate_ptr = packed_ptr + row * packed_stride + columns
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    grad_up = grad * gate * sigmoid
    grad_gate_ptr = grad_packed_ptr + row * (2 * width) + columns
    tl.store(grad_gate_ptr, grad_gate.to(grad_packed_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gate_ptr + width, grad_up.to(grad_packed_ptr.dtype.element_ty), mask=inside)


def launch_forward(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [N, F], contiguous, from packed [N, 2F] with any row stride; N and F are positive."""
    rows, width = out.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = (rows * triton.cdiv(width, block),)
    swiglu_forward_kernel[grid](packed, out, width, packed.stride(0), BLOCK=block, num_warps=NUM_WARPS)


def launch_backward(grad: torch.Tensor, packed: torch.Tensor, grad_packed: torch.Tensor) -> None:
    """Fill grad_packed [N, 2F], contiguous, from grad [N, F] and packed [N, 2F] with any row strides."""
    rows, width = grad.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    grid = (rows * triton.cdiv(width, block),)
    swiglu_backward_kernel[grid](
        grad, packed, grad_packed, width, grad.stride(0), packed.stride(0), BLOCK=block, num_warps=NUM_WARPS
    )
