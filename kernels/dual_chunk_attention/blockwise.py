"""Dual Chunk Attention over rectangles of logits (`segments.py`), merged exactly: what runs where no kernel does.

Memory beside inputs, results and rotated keys is that of the rows of one run, whatever the length. On a CPU a rectangle
is computed by the kernels behind `scaled_dot_product_attention`, which return the log-sum-exp and take any in backward.

    forward   (o, lse) over all pieces of a row: lse = log sum_p exp(lse_p), o = sum_p o_p exp(lse_p - lse)
    backward  P = exp(logits - lse) with the merged lse and D = rowsum(dO o) with the merged o make every piece exact;
              dq = sum over variants of R(-P_q) sum over pieces of dS K; dk = R(-P_k) sum over pieces of dS^T Q

Shapes: B sequences, S, K tokens of q and k, H heads, G = Hkv, D head size.
"""

from __future__ import annotations

import torch

from . import pieces
from .request import AttentionRequest, Sequences, batched, sequences
from .rotation import Rotation
from .segments import Run, runs

# Rows of a run: their rotated queries and wide sums are the memory used. 8192 tokens of 4 heads of 64 in fp32 took
# 0.54, 0.50, 0.47, 0.48 s of CPU time with 512, 1024, 2048, 4096 rows (torch 2.13, one thread).
LONGEST_RUN = 2048


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, request: AttentionRequest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output like q and lse [B, H, S] or [H, T]; arguments as in `reference.forward`, no gradient."""
    q_BSHD, k_BKGD, v_BKGD = (batched(each) for each in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    output = q_BSHD.new_empty(q_BSHD.shape)
    lse = q_BSHD.new_empty((q_BSHD.shape[0], q_BSHD.shape[2], q_BSHD.shape[1]), dtype=wide)
    output.zero_()
    lse.fill_(-torch.inf)
    for each in sequences(request, q_BSHD, k_BKGD):
        rotation = Rotation(request, each, q_BSHD.device)
        keys, values = rotation.keys(k_BKGD[:, each.keys]), v_BKGD[:, each.keys]
        queries, out, of_rows = q_BSHD[:, each.queries], output[:, each.queries], lse[:, :, each.queries]
        for run in _runs(request, each):
            rows = slice(run.first_row, run.last_row)
            _forward_run(run, queries, keys, values, rotation, request.scale, (out[:, rows], of_rows[:, :, rows]))
    return output.view(q.shape), lse if q.dim() == 4 else lse[0]


def _runs(request: AttentionRequest, each: Sequences) -> list[Run]:
    sizes = each.query_start, each.queries.stop - each.queries.start, each.key_start, each.keys.stop - each.keys.start
    return list(runs(request.chunks, *sizes, LONGEST_RUN))


def _forward_run(
    run: Run,
    q_BSHD: torch.Tensor,
    k_BKGD: torch.Tensor,
    v_BKGD: torch.Tensor,
    rotation: Rotation,
    scale: float,
    into: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Write output and lse of a run's rows."""
    output, lse = into
    total = rotated = q_BSHD
    variant = -1
    for index, piece in enumerate(run.pieces):
        if piece.variant != variant:
            variant, rotated = piece.variant, rotation.queries(q_BSHD, run.first_row, run.last_row, piece.variant)
        columns = slice(piece.first_key, piece.last_key)
        part, part_lse = pieces.attend(rotated, k_BKGD[:, columns], v_BKGD[:, columns], scale, piece.is_causal)
        if index:
            _fold(total, lse, part, part_lse)
        else:
            total = part.to(lse.dtype)
            lse.copy_(part_lse)
    output.copy_(total)


def _fold(total: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Add a piece to the weighted mean of output and to lse, in place; it has keys for each row, so its lse is finite.

    The weights add up to 1 whatever the roundings of both lse, which exp(lse - merged) would not: an output too large
    by n roundings puts D off by as many, and dS with it (dk of 11 tokens was off by 63 roundings, and is by 15).
    """
    difference = (part_lse - lse).transpose(1, 2).unsqueeze(-1)
    total.mul_(torch.sigmoid(-difference)).addcmul_(part.to(total.dtype), torch.sigmoid(difference))
    lse.copy_(torch.logaddexp(lse, part_lse))


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    request: AttentionRequest,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of q, k and v, contiguous; arguments as in `reference.backward`."""
    grad_BSHD, q_BSHD, k_BKGD, v_BKGD, output_BSHD = (batched(each) for each in (grad, q, k, v, output))
    lse_BHS = lse if q.dim() == 4 else lse.unsqueeze(0)
    grads = [each.new_empty(each.shape).zero_() for each in (q_BSHD, k_BKGD, v_BKGD)]
    for each in sequences(request, q_BSHD, k_BKGD):
        rotation = Rotation(request, each, q_BSHD.device)
        keys, values = rotation.keys(k_BKGD[:, each.keys]), v_BKGD[:, each.keys]
        sums = [torch.zeros(heads.shape, dtype=lse.dtype, device=lse.device) for heads in (keys, values)]
        for run in _runs(request, each):
            of_run = slice(each.queries.start + run.first_row, each.queries.start + run.last_row)
            rows = grad_BSHD[:, of_run], output_BSHD[:, of_run], lse_BHS[:, :, of_run]
            grads[0][:, of_run] = _backward_run(
                run, rows, q_BSHD[:, each.queries], (keys, values), rotation, request.scale, sums
            )
        grads[1][:, each.keys] = rotation.keys_back(sums[0])
        grads[2][:, each.keys] = sums[1]
    return grads[0].view(q.shape), grads[1].view(k.shape), grads[2].view(v.shape)


def _backward_run(
    run: Run,
    of_rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q_BSHD: torch.Tensor,
    keys_values: tuple[torch.Tensor, torch.Tensor],
    rotation: Rotation,
    scale: float,
    sums: list[torch.Tensor],
) -> torch.Tensor:
    """Return the gradient of a run's queries, wide, and add those of rotated keys and of values to sums.

    of_rows: gradient and value of the output, and lse.
    """
    total = torch.zeros(of_rows[0].shape, dtype=of_rows[2].dtype, device=of_rows[2].device)
    of_variant = torch.zeros_like(total)
    variant, rotated = -1, q_BSHD
    for index, piece in enumerate(run.pieces):
        if piece.variant != variant:
            variant, rotated = piece.variant, rotation.queries(q_BSHD, run.first_row, run.last_row, piece.variant)
            of_variant.zero_()
        columns = slice(piece.first_key, piece.last_key)
        keys, values = (each[:, columns] for each in keys_values)
        parts = pieces.attend_backward(of_rows, rotated, keys, values, scale, piece.is_causal)
        for into, part in zip((of_variant, *(each[:, columns] for each in sums)), parts, strict=True):
            into.add_(part)
        if index + 1 == len(run.pieces) or run.pieces[index + 1].variant != variant:
            total.add_(rotation.queries_back(of_variant, run.first_row, run.last_row, variant))
    return total
