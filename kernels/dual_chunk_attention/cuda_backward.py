"""The gradient of Dual Chunk Attention by the CUDA kernels of the extension (sm_90a); see kernel_backward.py.

Four or five launches: rotated copies of queries (and keys), two numbers per row, then dk and dv by tiles of keys and dq
by tiles of queries. Both turn their results back to the angles of what was given in registers, so nothing is kept in
fp32 but those two numbers, and nothing is added up in memory: the same bits every time.

Shapes: B sequences, T tokens of packed ones, Sq, Sk tokens of q and k, Hq, Hkv heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch

from ... import _C
from ..cuda_launch import dtype_name, launching_on
from .cuda_arguments import heads_of, problem_of, shape_of
from .cuda_rotation import rotated_keys, rotated_queries
from .request import AttentionRequest
from .tile_lists import Tiles, tiles_of_keys, tiles_of_queries


def launch_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    request: AttentionRequest,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, contiguous; lse may be that of more keys than these (ring attention)."""
    dq, dk, dv = (each.new_empty(each.shape) for each in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    turns_keys = request.tables is not None and not request.keys_rotated
    with launching_on(q) as stream:
        keys, queries = rotated_keys(k, request, stream), rotated_queries(q, request, stream)
        exponents, deltas = _row_terms(grad, output, lse, stream)

        def problem(tiles: Tiles) -> dict[str, Any]:
            return {
                "problem": problem_of(q, k, request, tiles),
                "rows": (_copies(queries), exponents.data_ptr(), deltas.data_ptr()),
                "k": heads_of(keys),
                "v": heads_of(v),
                "grad": heads_of(grad),
                "dtype": dtype_name(q),
                "stream": stream,
            }

        of_keys, of_queries = (
            list_of(request, each, _C.attention_tile_rows)
            for list_of, each in ((tiles_of_keys, k), (tiles_of_queries, q))
        )
        _C.attention_keys_backward(**problem(of_keys), turns_back=turns_keys, dk=dk.data_ptr(), dv=dv.data_ptr())
        _C.attention_queries_backward(**problem(of_queries), dq=dq.data_ptr())
    return dq, dk, dv


def _row_terms(
    grad: torch.Tensor, output: torch.Tensor, lse: torch.Tensor, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log2(e) lse and the sum of grad output of each row, as lse."""
    lse = lse.contiguous()
    exponents, deltas = torch.empty_like(lse), torch.empty_like(lse)
    _C.attention_row_terms(
        grad=heads_of(grad),
        output=heads_of(output),
        shape=shape_of(grad),
        lse=lse.data_ptr(),
        exponents=exponents.data_ptr(),
        deltas=deltas.data_ptr(),
        dtype=dtype_name(grad),
        stream=stream,
    )
    return exponents, deltas


def _copies(heads: torch.Tensor) -> tuple[int, int, int, int]:
    """Return [copies, B, S, H, D] or [copies, T, H, D] as one batch; several copies are contiguous."""
    of_batch = heads.stride(0 if heads.dim() == 4 else 1)
    return heads.data_ptr(), of_batch, heads.stride(-3), heads.stride(-2)
