"""Checks of arguments that estimation and attention share."""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ..dual_chunk_attention import ChunkLayout
from ..dual_chunk_attention.arguments import checked_request
from ..dual_chunk_attention.request import AttentionRequest

OP = "sparse_prefill_attention"


def checked_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    chunks: ChunkLayout | None,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    keys_rotated: bool,
    softmax_scale: float | None,
    logit_scale: torch.Tensor | None,
) -> AttentionRequest:
    """Return the arguments of a call for one sequence [S, H, D] as a request without boundaries.

    Raises:
        ConfigError: one of them does not fit, there are more queries than keys, or a gradient is wanted.
    """
    for name, heads in (("q", q), ("k", k), ("v", v)):
        if heads.dim() != 3:
            raise ConfigError(f"{OP}: {name} has shape {tuple(heads.shape)}; expected [S, H, D], one sequence")
    if torch.is_grad_enabled() and any(each.requires_grad for each in (q, k, v)):
        raise ConfigError(f"{OP}: an input requires a gradient, expected none; differentiate dual_chunk_attention")
    if q.shape[0] > k.shape[0]:
        raise ConfigError(
            f"{OP}: {q.shape[0]} queries, {k.shape[0]} keys; expected no more queries than keys, with which they end"
        )
    return checked_request(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        chunks=chunks,
        tables=tables,
        keys_rotated=keys_rotated,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        query_start=None,
        key_start=0,
        softmax_scale=softmax_scale,
        logit_scale=logit_scale,
        deterministic=True,
    )
