"""Bias, rotary embedding and split by the CUDA kernels of the extension; the same functions as in kernel.py.

Shapes: T tokens, W = groups * per_group * D a packed row, S, B sequence and batch, P positions, H = half.
"""

from __future__ import annotations

import torch

from ... import _C
from ..cuda_launch import address, dtype_name, launching_on
from .layout import Layout


def launch_forward(
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor | None,
    repeat: int,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: Layout,
) -> None:
    """Fill q, k, v, contiguous, from packed [T, W] with any row stride; token t has position positions[t // repeat]."""
    q, k, v = outputs
    with launching_on(packed) as stream:
        _C.qkv_rope_forward(
            packed=packed.data_ptr(),
            bias=address(bias),
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            tables=_tables(tables),
            positions=_positions(positions, repeat),
            layout=_layout(layout),
            tokens=packed.shape[0],
            packed_stride=packed.stride(0),
            dtype=dtype_name(packed),
            bias_dtype=dtype_name(packed if bias is None else bias),
            stream=stream,
        )


def launch_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor | None,
    repeat: int,
    grad_packed: torch.Tensor,
    grad_bias: torch.Tensor | None,
    layout: Layout,
) -> None:
    """Fill grad_packed [T, W], contiguous, and grad_bias [W] from grads [S, B, heads, D], each head contiguous."""
    tokens, width = grad_packed.shape
    dtype = dtype_name(grad_packed)
    with launching_on(grad_packed) as stream:
        programs = _C.qkv_rope_backward_programs(layout=_layout(layout), half=layout.half, tokens=tokens, dtype=dtype)
        partial = None
        if grad_bias is not None:
            partial = torch.empty(programs, width, dtype=torch.float32, device=grad_packed.device)
        _C.qkv_rope_backward(
            grad_q=_heads(grads[0]),
            grad_k=_heads(grads[1]),
            grad_v=_heads(grads[2]),
            grad_packed=grad_packed.data_ptr(),
            grad_bias=address(grad_bias),
            partial=address(partial),
            tables=_tables(tables),
            positions=_positions(positions, repeat),
            layout=_layout(layout),
            tokens=tokens,
            batch=grads[0].shape[1],
            num_programs=programs,
            dtype=dtype,
            bias_dtype=dtype if grad_bias is None else dtype_name(grad_bias),
            stream=stream,
        )


def launch_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    tables: tuple[torch.Tensor, torch.Tensor],
    positions: torch.Tensor | None,
    repeat: int,
    inverse: bool,
) -> None:
    """Rotate q [S, B, heads, D] and k in place, at any strides with each head contiguous; back again if inverse."""
    with launching_on(q) as stream:
        _C.rope(
            q=_heads(q),
            k=(0, 0, 0, 0) if k is None else _heads(k),
            tables=_tables(tables),
            positions=_positions(positions, repeat),
            q_heads=q.shape[2],
            k_heads=0 if k is None else k.shape[2],
            head_dim=q.shape[3],
            tokens=q.shape[0] * q.shape[1],
            batch=q.shape[1],
            inverse=inverse,
            dtype=dtype_name(q),
            stream=stream,
        )


def _heads(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Address and strides of [S, B, heads, D]; the stride of an axis of one is arbitrary, so it must not decide."""
    sequence, batch, head = (
        stride if size > 1 else 0 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    )
    return tensor.data_ptr(), sequence, batch, head


def _tables(tables: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int, int, int]:
    cos, sin = tables
    return cos.data_ptr(), sin.data_ptr(), cos.shape[0], cos.shape[1]


def _positions(positions: torch.Tensor | None, repeat: int) -> tuple[int, int, int]:
    return address(positions), 0 if positions is None else positions.element_size(), repeat


def _layout(layout: Layout) -> tuple[int, int, int]:
    return layout.groups, layout.per_group - 2, layout.head_dim
