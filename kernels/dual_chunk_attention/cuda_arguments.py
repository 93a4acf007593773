"""Arguments of the CUDA kernels of attention, as the extension wants them; see _C.pyi.

Shapes: B sequences, T tokens of packed ones, S tokens of a row, H heads, D head size.
"""

from __future__ import annotations

import torch

from ..cuda_launch import address
from .request import AttentionRequest
from .tile_lists import Tiles, stride_of, strides

# `_AttentionProblem` of _C.pyi.
Problem = tuple[
    tuple[int, int, int, int, int, int],
    tuple[int, int, int, int, bool],
    tuple[int, int, int, int, int],
    tuple[int, int, int, int],
    tuple[int, int, int],
    float,
    int,
]


def heads_of(heads: torch.Tensor) -> tuple[int, int, int, int]:
    """Return address and strides of heads as launches want them: 0 where there is nothing to step over."""
    steps = zip(strides(heads), (1, *heads.shape)[-4:-1], strict=True)
    batch, row, head = (0 if size == 1 else stride for stride, size in steps)
    return heads.data_ptr(), batch, row, head


def shape_of(heads: torch.Tensor) -> tuple[int, int, int, int]:
    """Return B, S, H and D; packed sequences are a batch of one."""
    return (1 if heads.dim() == 3 else heads.shape[0], *heads.shape[-3:])


def tables_of(request: AttentionRequest) -> tuple[int, int, int]:
    """Return the tables as launches want them: zeros without any."""
    if request.tables is None:
        return 0, 0, 0
    cos, sin = request.tables
    return cos.data_ptr(), sin.data_ptr(), cos.shape[0]


def chunks_of(request: AttentionRequest) -> tuple[int, int, int, int, bool]:
    """Return L, cap, position towards older chunks, first row of that position towards the previous, whether plain."""
    chunks = request.chunks
    if chunks is None:
        return stride_of(request), 0, 0, 0, True
    return chunks.stride, chunks.limit, chunks.inter_position, chunks.alike_from, False


def problem_of(q: torch.Tensor, k: torch.Tensor, request: AttentionRequest, tiles: Tiles) -> Problem:
    """Return what all passes of attention want to know."""
    of_q, of_k = request.cu_seqlens or (None, None)
    sizes = (1 if q.dim() == 3 else q.shape[0], q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1])
    sequences = (
        address(of_q),
        address(of_k),
        0 if of_q is None else of_q.element_size(),
        request.query_start,
        request.key_start,
    )
    return (
        sizes,
        chunks_of(request),
        sequences,
        (address(tiles.list_of_tiles), tiles.slots, tiles.first_tile, tiles.per_chunk),
        tables_of(request),
        request.scale,
        address(request.logit_scale),
    )
