"""Dual Chunk Attention by its definition, with the matrix of all logits: what everything else is compared with.

    logits[i, j] = scale * logit_scale[i] * <R(P_q(i, j)) q_i, R(P_k(j)) k_j>   for visible keys j <= i
    o_i = sum_j softmax_j(logits[i, :]) v_j

with the positions of `layout.py`, R the rotation of `rope/reference.py`. Rotated heads and probabilities are rounded to
the dtype of the inputs, as anything that multiplies in that dtype must; sums and the softmax are fp32, fp64 for fp64.
Memory grows with the square of the length.

Shapes: B sequences, S, K tokens of q and k, H heads, G = Hkv, D head size.
"""

from __future__ import annotations

import torch

from . import layout
from .request import AttentionRequest, Sequences, batched, sequences


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, request: AttentionRequest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output like q and lse [B, H, S] or [H, T]; differentiable by torch."""
    q_BSHD, k_BKGD, v_BKGD = (batched(each) for each in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    output = q_BSHD.new_zeros(q_BSHD.shape)
    lse = q_BSHD.new_full((q_BSHD.shape[0], q_BSHD.shape[2], q_BSHD.shape[1]), -torch.inf, dtype=wide)
    for each in sequences(request, q_BSHD, k_BKGD):
        logits_BHSK = _logits(q_BSHD, k_BKGD, request, each)
        of_rows = logits_BHSK.logsumexp(-1)
        probabilities = (logits_BHSK - _finite(of_rows).unsqueeze(-1)).exp()
        values = _per_query_head(v_BKGD[:, each.keys], q_BSHD.shape[2])
        output[:, each.queries] = (probabilities.to(q.dtype) @ values).transpose(1, 2)
        lse[:, :, each.queries] = of_rows
    return output.view(q.shape), lse if q.dim() == 4 else lse[0]


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    request: AttentionRequest,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, for probabilities exp(logits - lse) of any lse at or above that of the keys.

    dV = P^T dO; dS = P (dO V^T - D), D = rowsum(dO O); dq and dk are what torch finds for dS as gradient of the logits.
    """
    grad_BSHD, q_BSHD, k_BKGD, v_BKGD, output_BSHD = (batched(each) for each in (grad, q, k, v, output))
    lse_BHS = lse if q.dim() == 4 else lse.unsqueeze(0)
    with torch.enable_grad():
        q_BSHD, k_BKGD = (each.detach().requires_grad_() for each in (q_BSHD, k_BKGD))
        grads = [torch.zeros_like(each) for each in (q_BSHD, k_BKGD, v_BKGD)]
        for each in sequences(request, q_BSHD, k_BKGD):
            rows = slice(None), each.queries
            logits_BHSK = _logits(q_BSHD, k_BKGD, request, each)
            probabilities = (logits_BHSK.detach() - _finite(lse_BHS[:, :, each.queries, None])).exp()
            grad_BHSD = grad_BSHD[rows].transpose(1, 2)
            values = _per_query_head(v_BKGD[:, each.keys], q_BSHD.shape[2])
            of_probabilities = (grad_BHSD @ values.transpose(-1, -2)).to(lse.dtype)
            delta = (grad_BSHD[rows].to(lse.dtype) * output_BSHD[rows]).sum(-1).transpose(1, 2).unsqueeze(-1)
            of_logits = probabilities * (of_probabilities - delta)
            for total, part in zip(grads, torch.autograd.grad(logits_BHSK, (q_BSHD, k_BKGD), of_logits), strict=False):
                total.add_(part)
            of_values = probabilities.to(q.dtype).transpose(-1, -2) @ grad_BHSD
            of_values = torch.unflatten(of_values, 1, (v_BKGD.shape[2], -1))
            grads[2][:, each.keys] = of_values.sum(2).transpose(1, 2)
    return grads[0].view(q.shape), grads[1].view(k.shape), grads[2].view(v.shape)


def _finite(lse: torch.Tensor) -> torch.Tensor:
    """0 for rows without visible keys, so that the exponentials of their logits (-inf) are 0 and not NaN."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def _logits(q_BSHD: torch.Tensor, k_BKGD: torch.Tensor, request: AttentionRequest, each: Sequences) -> torch.Tensor:
    """[B, H, S, K] of some sequences, -inf where a key is not visible."""
    q_BSHD, k_BKGD = q_BSHD[:, each.queries], k_BKGD[:, each.keys]
    rows = torch.arange(q_BSHD.shape[1], device=q_BSHD.device) + each.query_start
    columns = torch.arange(k_BKGD.shape[1], device=q_BSHD.device) + each.key_start
    chunks = request.chunks
    tables = None if request.keys_rotated else request.tables
    keys = _rotated(k_BKGD, tables, columns if chunks is None else layout.key_positions(chunks, columns))
    keys_BHDK = _per_query_head(keys, q_BSHD.shape[2]).transpose(-1, -2)

    def products(positions: torch.Tensor) -> torch.Tensor:
        products_BHSK = _rotated(q_BSHD, request.tables, positions).transpose(1, 2) @ keys_BHDK
        return products_BHSK.to(torch.promote_types(q_BSHD.dtype, torch.float32)) * request.scale

    if chunks is None:
        logits = products(rows)
    else:
        intra, succ, inter = (products(positions) for positions in layout.query_positions(chunks, rows))
        back = layout.chunks_back(chunks, rows, columns)
        logits = torch.where(back == 0, intra, torch.where(back == 1, succ, inter))
    if request.logit_scale is not None:
        logits = logits * request.logit_scale[each.queries, None]
    return logits.masked_fill(columns[None, :] > rows[:, None], -torch.inf)


def _rotated(
    heads: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None, positions: torch.Tensor
) -> torch.Tensor:
    """Heads [B, S, H, D] rotated at positions [S], in fp32 or fp64 and rounded once."""
    if tables is None:
        return heads
    # Rows before position 0 see no keys: any rotation will do.
    cos, sin = (table[positions.clamp(min=0)].unsqueeze(1) for table in tables)
    wide, half = heads.to(cos.dtype), cos.shape[-1]
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1).to(heads.dtype)


def _per_query_head(heads_BKGD: torch.Tensor, query_heads: int) -> torch.Tensor:
    """Keys or values [B, K, G, D] repeated for the query heads that share them, [B, H, K, D]."""
    return heads_BKGD.transpose(1, 2).repeat_interleave(query_heads // heads_BKGD.shape[2], 1)
