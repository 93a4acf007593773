"""RMSNorm by the CUDA kernels of the extension; the same functions as in kernel.py."""

from __future__ import annotations

import torch

from ... import _C
from ..cuda_launch import address, dtype_name, launching_on


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
    with launching_on(x) as stream:
        _C.rms_norm_forward(
            x=x.data_ptr(),
            residual=address(residual),
            weight=weight.data_ptr(),
            y=y.data_ptr(),
            sum=address(total),
            inverse_rms=inverse_rms.data_ptr(),
            rows=rows,
            hidden=hidden,
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            eps=eps,
            dtype=dtype_name(x),
            weight_dtype=dtype_name(weight),
            stream=stream,
        )


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
    dtype, weight_dtype = dtype_name(x), dtype_name(weight)
    with launching_on(x) as stream:
        programs = _C.rms_norm_backward_programs(rows=rows, hidden=hidden, dtype=dtype, adds=grad_sum is not None)
        partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
        _C.rms_norm_backward(
            grad=grad.data_ptr(),
            grad_sum=address(grad_sum),
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            inverse_rms=inverse_rms.data_ptr(),
            grad_x=grad_x.data_ptr(),
            grad_weight=grad_weight.data_ptr(),
            partial=partial.data_ptr(),
            rows=rows,
            hidden=hidden,
            x_stride=x.stride(0),
            num_programs=programs,
            dtype=dtype,
            weight_dtype=weight_dtype,
            stream=stream,
        )
