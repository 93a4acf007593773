"""SwiGLU by the CUDA kernels of the extension; the same functions as in kernel.py."""

from __future__ import annotations

import torch

from ... import _C
from ..cuda_launch import dtype_name, launching_on


def launch_forward(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [N, F], contiguous, from packed [N, 2F] with any row stride; N and F are positive."""
    rows, width = out.shape
    with launching_on(packed) as stream:
        _C.swiglu_forward(
            packed=packed.data_ptr(),
            out=out.data_ptr(),
            rows=rows,
            width=width,
            packed_stride=packed.stride(0),
            dtype=dtype_name(packed),
            stream=stream,
        )


def launch_backward(grad: torch.Tensor, packed: torch.Tensor, grad_packed: torch.Tensor) -> None:
    """Fill grad_packed [N, 2F], contiguous, from grad [N, F] and packed [N, 2F] with any row strides."""
    rows, width = grad.shape
    with launching_on(packed) as stream:
        _C.swiglu_backward(
            grad=grad.data_ptr(),
            packed=packed.data_ptr(),
            grad_packed=grad_packed.data_ptr(),
            rows=rows,
            width=width,
            grad_stride=grad.stride(0),
            packed_stride=packed.stride(0),
            dtype=dtype_name(packed),
            stream=stream,
        )
