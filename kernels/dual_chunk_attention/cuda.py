"""Dual Chunk Attention by the CUDA kernels of the extension (sm_90a: wgmma, TMA); the same functions as in kernel.py.

Forward is two launches: keys rotated once (where they are not yet), and one pass over them for each tile of queries,
which are rotated inside of it.

Shapes: B sequences, T tokens of packed ones, Sq, Sk tokens of q and k, Hq, Hkv heads, D head size.
"""

from __future__ import annotations

import torch

from ... import _C
from ..cuda_launch import dtype_name, launching_on
from .cuda_arguments import heads_of, problem_of
from .cuda_backward import launch_backward
from .cuda_rotation import rotated_keys
from .request import AttentionRequest
from .tile_lists import tiles_of_queries

__all__ = ["launch_backward", "launch_forward"]


def launch_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, request: AttentionRequest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output like q, contiguous, and lse [B, Hq, Sq] or [Hq, Tq]; head sizes 64 and 128, 16-bit dtypes."""
    heads, rows = q.shape[-2], q.shape[-3]
    output = q.new_empty(q.shape)
    lse = q.new_empty((*q.shape[:-3], heads, rows), dtype=torch.float32)
    if not q.numel():
        return output, lse
    with launching_on(q) as stream:
        k = rotated_keys(k, request, stream)
        tiles = tiles_of_queries(request, q, _C.attention_tile_rows)
        _C.attention_forward(
            problem=problem_of(q, k, request, tiles),
            q=heads_of(q),
            k=heads_of(k),
            v=heads_of(v),
            out=output.data_ptr(),
            lse=lse.data_ptr(),
            dtype=dtype_name(q),
            stream=stream,
        )
    return output, lse
