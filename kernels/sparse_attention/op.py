"""`sparse_prefill_attention` as an operation of torch.

Shapes: S, K tokens of q and k, H query heads, G key heads, D head size, V verticals and N slashes of all heads.
"""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ..backends import backend_for, register_operation
from ..dual_chunk_attention import ChunkLayout
from ..dual_chunk_attention.arguments import unfit
from ..dual_chunk_attention.request import AttentionRequest
from ..registration import register
from . import attention
from .arguments import OP, checked_sequence
from .index import SparseIndex

register_operation(OP, "triton")


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    verticals: torch.Tensor,
    vertical_bounds: torch.Tensor,
    slashes: torch.Tensor,
    slash_bounds: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    chunks: list[int],
    keys_rotated: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    index = SparseIndex(k.shape[0], verticals, vertical_bounds, slashes, slash_bounds)
    request = AttentionRequest(
        chunks=ChunkLayout(*chunks) if chunks else None,
        tables=None if cos is None or sin is None else (cos, sin),
        keys_rotated=keys_rotated,
        cu_seqlens=None,
        query_start=k.shape[0] - q.shape[0],
        key_start=0,
        scale=scale,
        logit_scale=logit_scale,
        deterministic=True,
    )
    if backend_for(OP, q, unfit(q, cos, scale, k, v)) == "reference":
        return attention.forward(q, k, v, index, request)
    from . import kernel

    return kernel.launch_forward(q, k, v, index, request)


def _attend_fake(q: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


_operation = register(OP, _attend, _attend_fake)


def sparse_prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: SparseIndex,
    *,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    keys_rotated: bool = False,
    softmax_scale: float | None = None,
    logit_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `dual_chunk_attention` of one sequence over the kept pairs of row and key only; no gradient.

    Args:
        q: [S, H, D], the last S tokens of the sequence; raw where tables are given.
        k: [K, G, D], the first K >= S tokens; G divides H.
        v: as k.
        index: for H heads and K keys, on the device of q.
        chunks: None for plain causal attention.
        tables: cos and sin; see `dual_chunk_attention`.
        keys_rotated: k comes rotated at j mod L (plain: at j).
        softmax_scale: 1 / sqrt(D) by default.
        logit_scale: fp32 [S] (fp64 for fp64), multiplies the logits of each row.

    Returns:
        Output [S, H, D] and the natural log-sum-exp over kept keys [H, S], fp32 (fp64 for fp64); 0 and -inf for a row
        without a kept key.

    Raises:
        ConfigError: an argument does not fit, or a gradient is wanted.
    """
    request = checked_sequence(
        q,
        k,
        v,
        chunks=chunks,
        tables=tables,
        keys_rotated=keys_rotated,
        softmax_scale=softmax_scale,
        logit_scale=logit_scale,
    )
    if index.heads != q.shape[1] or index.length != k.shape[0]:
        raise ConfigError(
            f"{OP}: the index is for {index.heads} heads and {index.length} keys; expected {q.shape[1]} and "
            f"{k.shape[0]}"
        )
    if index.verticals.device != q.device:
        raise ConfigError(f"{OP}: the index is on {index.verticals.device}; expected {q.device}, where q is")
    lists = index.verticals, index.vertical_bounds, index.slashes, index.slash_bounds
    cos, sin = request.tables or (None, None)
    layout = [] if chunks is None else [chunks.chunk_size, chunks.local_size, chunks.limit]
    run = _attend if q.is_cpu and not torch.compiler.is_compiling() else _operation
    return run(q, k, v, *lists, cos, sin, request.logit_scale, layout, keys_rotated, request.scale)
