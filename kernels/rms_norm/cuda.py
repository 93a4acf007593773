"""RMSNorm by the CUDA kernels of the extension; the same functions as in kernel.py."""

from __future__ import annotations

import torch

from ...errors import ConfigError
from .. import extension


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
    from ... import _C

    rows, hidden = x.shape
    with extension.stream(x.device) as stream:
        _C.rms_norm_forward(
            x=extension.address(x),
            residual=extension.address(residual),
            weight=extension.address(weight),
            y=extension.address(y),
            sum=extension.address(total),
            inverse_rms=extension.address(inverse_rms),
            rows=rows,
            hidden=hidden,
            x_stride=x.stride(0),
            residual_stride=0 if residual is None else residual.stride(0),
            eps=eps,
            dtype=extension.DTYPE_NAMES[x.dtype],
            weight_dtype=_dtype_of_weight(weight),
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
    from ... import _C

    rows, hidden = x.shape
    dtype, weight_dtype = extension.DTYPE_NAMES[x.dtype], _dtype_of_weight(weight)
    with extension.stream(x.device) as stream:
        programs = _C.rms_norm_backward_programs(rows=rows, hidden=hidden, dtype=dtype, adds=grad_sum is not None)
        partial = torch.empty(programs, hidden, dtype=torch.float32, device=x.device)
        _C.rms_norm_backward(
            grad=extension.address(grad),
            grad_sum=extension.address(grad_sum),
            x=extension.address(x),
            weight=extension.address(weight),
            inverse_rms=extension.address(inverse_rms),
            grad_x=extension.address(grad_x),
            grad_weight=extension.address(grad_weight),
            partial=extension.address(partial),
            rows=rows,
            hidden=hidden,
            x_stride=x.stride(0),
            num_programs=programs,
            dtype=dtype,
            weight_dtype=weight_dtype,
            stream=stream,
        )


def _dtype_of_weight(weight: torch.Tensor) -> str:
    if weight.dtype not in extension.DTYPE_NAMES:
        raise ConfigError(
            f"rms_norm: weight has dtype {weight.dtype}; the CUDA kernel takes float32, bfloat16 or float16: "
            "convert it, or take another backend"
        )
    return extension.DTYPE_NAMES[weight.dtype]
