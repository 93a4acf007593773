"""What a call of `dual_chunk_attention` asks for beside q, k and v, and the sequences it consists of.

Shapes: B sequences, T tokens of packed ones, Sq, Sk tokens of q and k, Hq, Hkv heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .layout import ChunkLayout


@dataclass(frozen=True, kw_only=True)
class AttentionRequest:
    """Checked arguments of one call; see `dual_chunk_attention`.

    Attributes:
        chunks: None for plain causal attention.
        tables: cos and sin, [positions, R / 2] of the dtype of the computation; None if q and k are rotated.
        keys_rotated: k needs no rotation.
        cu_seqlens: of q and of k in the packed form [T, H, D]; None for [B, S, H, D].
        query_start: position of the first query; 0 in the packed form, where every sequence ends with its keys.
        key_start: position of the first key.
        scale: of the logits.
        logit_scale: of each row of q, in the dtype of the computation.
        deterministic: whether the gradients must have the same bits every time.
    """

    chunks: ChunkLayout | None
    tables: tuple[torch.Tensor, torch.Tensor] | None
    keys_rotated: bool
    cu_seqlens: tuple[torch.Tensor, torch.Tensor] | None
    query_start: int
    key_start: int
    scale: float
    logit_scale: torch.Tensor | None
    deterministic: bool


@dataclass(frozen=True)
class Sequences:
    """Sequences that share their positions: all of a batch, or one packed one.

    Attributes:
        queries: rows of q.
        keys: rows of k.
        query_start: position of the first of these queries.
        key_start: position of the first of these keys.
    """

    queries: slice
    keys: slice
    query_start: int
    key_start: int


def sequences(request: AttentionRequest, q_BSHD: torch.Tensor, k_BSHD: torch.Tensor) -> Iterator[Sequences]:
    """Yield the sequences of a call that have queries and keys; a packed one is [1, T, H, D]. Reads cu_seqlens."""
    if not q_BSHD.numel() or not k_BSHD.numel():
        return
    if request.cu_seqlens is None:
        bounds = [(0, q_BSHD.shape[1], 0, k_BSHD.shape[1])]
    else:
        of_q, of_k = (list(itertools.pairwise(each.tolist())) for each in request.cu_seqlens)
        bounds = [(*q, *k) for q, k in zip(of_q, of_k, strict=True)]
    for q_first, q_last, k_first, k_last in bounds:
        start = request.query_start
        if request.cu_seqlens is not None:
            start = (k_last - k_first) - (q_last - q_first)
        if q_first < q_last and k_first < k_last:
            yield Sequences(slice(q_first, q_last), slice(k_first, k_last), start, request.key_start)


def batched(tensor: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] as it is, packed [T, H, D] as [1, T, H, D]."""
    return tensor if tensor.dim() == 4 else tensor.unsqueeze(0)
