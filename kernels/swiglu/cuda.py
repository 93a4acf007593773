"""SwiGLU by the CUDA kernels of the extension; the same functions as in kernel.py."""

from __future__ import annotations

import torch

from .. import extension


def launch_forward(packed: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [N, F], contiguous, from packed [N, 2F] with any row stride; N and F are positive."""
    from ... import _C

    rows, width = out.shape
    with extension.stream(packed.device) as stream:
        _C.swiglu_forward(
            packed=extension.address(packed),
            out=extension.address(out),
            rows=rows,
            width=width,
            packed_stride=packed.stride(0),
            dtype=extension.DTYPE_NAMES[packed.dtype],
            stream=stream,
        )


def launch_backward(grad: torch.Tensor, packed: torch.Tensor, grad_packed: torch.Tensor) -> None:
    """Fill grad_packed [N, 2F], contiguous, from grad [N, F] and packed [N, 2F] with any row strides."""
    from ... import _C

    rows, width = grad.shape
    with extension.stream(packed.device) as stream:
        _C.swiglu_backward(
            grad=extension.address(grad),
            packed=extension.address(packed),
            grad_packed=extension.address(grad_packed),
            rows=rows,
            width=width,
            grad_stride=grad.stride(0),
            packed_stride=packed.stride(0),
            dtype=extension.DTYPE_NAMES[packed.dtype],
            stream=stream,
        )
