"""Checks of `dual_chunk_attention` for any backend, in the manner of op_checks.py; the definition is written anew here.

Shapes: S, K tokens of q and k, H, G heads of queries and keys, D head size, M pairs of a row and a key.
"""

from __future__ import annotations

import torch

from megatron_qwen import ops


def tables(length: int, dtype: torch.dtype, rotated: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rotated / 2] in fp32, or fp64 for fp64."""
    frequencies = 1e4 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def position_pair(chunks: ops.ChunkLayout | None, row: int, column: int) -> tuple[int, int]:
    """Positions of query and key of one pair, in words of the papers and the released code."""
    if chunks is None:
        return row, column
    length = chunks.chunk_size - chunks.local_size
    cap = chunks.chunk_size if chunks.cap is None else chunks.cap
    behind = row // length - column // length
    if behind == 0:
        return row % length, column % length
    if behind == 1:
        return min(row % length + length, cap), column % length
    return min(2 * length - 1, cap), column % length


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chunks: ops.ChunkLayout | None,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    *,
    logit_scale: torch.Tensor | None = None,
    query_start: int | None = None,
    key_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [S, H, D], k and v [K, G, D]: every pair's logit by itself, in the dtype of q but for softmax and rotation."""
    rows, columns = q.shape[0], k.shape[0]
    start = key_start + columns - rows if query_start is None else query_start
    heads = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    pairs = [(i, j) for i in range(rows) for j in range(columns) if j + key_start <= i + start]
    logits = q.new_full((rows, columns, q.shape[1]), -torch.inf, dtype=wide)
    i, j = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
    positions = [position_pair(chunks, a + start, b + key_start) for a, b in pairs]
    of_q, of_k = torch.tensor(positions, dtype=torch.int64).view(-1, 2).unbind(1)
    products = (rotated(q[i], cos_sin, of_q) * rotated(k[j], cos_sin, of_k)).sum(-1).to(wide)
    logits = logits.index_put((i, j), products * q.shape[2] ** -0.5)
    if logit_scale is not None:
        logits = logits * logit_scale[:, None, None]
    lse = logits.logsumexp(1)
    weights = (logits - torch.where(lse.isfinite(), lse, 0.0)[:, None]).exp().to(q.dtype)
    return torch.einsum("skh,khd->shd", weights, v), lse.t()


def rotated(heads_MHD: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """Each of the M heads at its own position; computed wide, rounded once."""
    dtype = torch.promote_types(heads_MHD.dtype, torch.float32)
    cos, sin = (table.to(dtype)[at][:, None] for table in cos_sin)
    half = cos.shape[-1]
    first, second, rest = heads_MHD.to(dtype).split([half, half, heads_MHD.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1).to(heads_MHD.dtype)
