"""Rotated copies of keys and queries by the CUDA kernel of the extension: as rotate_kernel.py.

Shapes: B sequences, T tokens of packed ones, S tokens of a row, H heads, D head size.
"""

from __future__ import annotations

import torch

from ... import _C
from ..cuda_launch import address, dtype_name
from .cuda_arguments import chunks_of, heads_of, shape_of, tables_of
from .request import AttentionRequest
from .tile_lists import positions_of_keys, positions_of_queries


def rotated_keys(k: torch.Tensor, request: AttentionRequest, stream: int) -> torch.Tensor:
    """Return k rotated once, at j mod L; k itself where that is done, not wanted, or there are none."""
    if request.tables is None or request.keys_rotated or not k.numel():
        return k
    return _rotated(k, request, positions_of_keys(request, k), request.key_start, 1, stream)[0]


def rotated_queries(q: torch.Tensor, request: AttentionRequest, stream: int) -> torch.Tensor:
    """Return q as each segment of keys wants it, [3, ...]; [1, ...] in plain attention; q [1, ...] if not rotated."""
    if request.tables is None:
        return q.unsqueeze(0)
    copies = 1 if request.chunks is None else 3
    return _rotated(q, request, positions_of_queries(request, q), request.query_start, copies, stream)


def _rotated(
    x: torch.Tensor, request: AttentionRequest, positions: torch.Tensor | None, start: int, copies: int, stream: int
) -> torch.Tensor:
    out = x.new_empty((copies, *x.shape))
    if positions is not None:
        positions = positions.to(torch.int32)
    _C.attention_rotate(
        x=heads_of(x),
        shape=shape_of(x),
        positions=address(positions),
        start=start,
        tables=tables_of(request),
        chunks=chunks_of(request),
        copies=copies,
        out=out.data_ptr(),
        dtype=dtype_name(x),
        stream=stream,
    )
    return out
