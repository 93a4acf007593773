"""Attention over one rectangle of logits, with its log-sum-exp, and its gradient for a log-sum-exp from outside.

On a CPU by the kernels that `scaled_dot_product_attention` takes there, which hold no matrix of logits; elsewhere by
matrix products over tiles of rows. Keys and values are not repeated for the query heads that share them.

Shapes: B sequences, S, K tokens of q and k, H heads, G = Hkv, M = H / G query heads that share a key head, D head size.
"""

from __future__ import annotations

import torch

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

TILE = 256
"""Rows whose logits `_attend_by_products` holds."""

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend(
    q_BSHD: torch.Tensor, k_BKGD: torch.Tensor, v_BKGD: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output [B, S, H, D] and lse [B, H, S]; is_causal: row t sees keys 0 to t."""
    attend_heads = _attend_on_cpu if q_BSHD.is_cpu else _attend_by_products
    k_BGKD, v_BGKD = k_BKGD.transpose(1, 2), v_BKGD.transpose(1, 2)
    batch, rows, heads, size = q_BSHD.shape
    groups = k_BGKD.shape[1]
    if heads == groups:
        output, lse = attend_heads(q_BSHD.transpose(1, 2), k_BGKD, v_BGKD, scale, is_causal)
        return output.transpose(1, 2), lse
    if rows == 1:
        # Decoding: the query heads of a key head as rows of one call.
        visible = slice(0, 1 if is_causal else None)
        grouped = q_BSHD.reshape(batch, groups, -1, size)
        output, lse = attend_heads(grouped, k_BGKD[:, :, visible], v_BGKD[:, :, visible], scale, False)
        return output.reshape(q_BSHD.shape), lse.reshape(batch, heads, 1)
    output_BSHD = q_BSHD.new_empty(q_BSHD.shape)
    lse_BHS = q_BSHD.new_empty((batch, heads, rows), dtype=torch.promote_types(q_BSHD.dtype, torch.float32))
    for shared in _sharing(heads, groups):
        output, lse_BHS[:, shared] = attend_heads(
            q_BSHD[:, :, shared].transpose(1, 2), k_BGKD, v_BGKD, scale, is_causal
        )
        output_BSHD[:, :, shared] = output.transpose(1, 2)
    return output_BSHD, lse_BHS


def attend_backward(
    of_rows: Rows, q_BSHD: torch.Tensor, k_BKGD: torch.Tensor, v_BKGD: torch.Tensor, scale: float, is_causal: bool
) -> Rows:
    """Return the gradients of q, k and v as those are; of_rows: gradient and value [B, S, H, D] of the output, and lse.

    Output and lse may be those over more keys than these: probabilities are exp(logits - lse).
    """
    backward_heads = _backward_on_cpu if q_BSHD.is_cpu else _backward_by_products
    grad_BHSD, output_BHSD, q_BHSD = (each.transpose(1, 2) for each in (*of_rows[:2], q_BSHD))
    k_BGKD, v_BGKD = k_BKGD.transpose(1, 2), v_BKGD.transpose(1, 2)
    grad_q = q_BSHD.new_empty(q_BSHD.shape)
    grad_k, grad_v = (torch.zeros(each.shape, dtype=of_rows[2].dtype, device=each.device) for each in (k_BKGD, v_BKGD))
    for shared in _sharing(q_BSHD.shape[2], k_BKGD.shape[2]):
        rows = grad_BHSD[:, shared], output_BHSD[:, shared], of_rows[2][:, shared]
        parts = backward_heads(rows, q_BHSD[:, shared], k_BGKD, v_BGKD, scale, is_causal)
        of_q, of_k, of_v = (part.transpose(1, 2) for part in parts)
        grad_q[:, :, shared] = of_q
        grad_k += of_k
        grad_v += of_v
    return grad_q, grad_k, grad_v


def _sharing(heads: int, groups: int) -> list[slice]:
    """Query heads, one for each key head at a time: with them keys need not be repeated."""
    shared = heads // groups
    return [slice(index, None, shared) for index in range(shared)]


def _attend_on_cpu(
    q_BGSD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKD: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = _forward(q_BGSD, k_BGKD, v_BGKD, 0.0, is_causal, scale=scale)
    return output, lse


def _backward_on_cpu(
    of_rows: Rows, q_BGSD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKD: torch.Tensor, scale: float, is_causal: bool
) -> Rows:
    grad, output, lse = of_rows
    of_q, of_k, of_v = _backward(grad, q_BGSD, k_BGKD, v_BGKD, output, lse, 0.0, is_causal, scale=scale)
    return of_q, of_k, of_v


def _attend_by_products(
    q_BGSD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKD: torch.Tensor, scale: float, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, lses = [], []
    for first in range(0, q_BGSD.shape[2], TILE):
        logits = _logits(q_BGSD[:, :, first : first + TILE], k_BGKD, scale, first if is_causal else None)
        outputs.append(logits.softmax(-1).to(q_BGSD.dtype) @ v_BGKD)
        lses.append(logits.logsumexp(-1))
    return torch.cat(outputs, 2), torch.cat(lses, 2)


def _backward_by_products(
    of_rows: Rows, q_BGSD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKD: torch.Tensor, scale: float, is_causal: bool
) -> Rows:
    wide = of_rows[2].dtype
    of_q = []
    of_k, of_v = (torch.zeros(each.shape, dtype=wide, device=each.device) for each in (k_BGKD, v_BGKD))
    for first in range(0, q_BGSD.shape[2], TILE):
        q, grad, output, lse = (each[:, :, first : first + TILE] for each in (q_BGSD, *of_rows))
        probabilities = (_logits(q, k_BGKD, scale, first if is_causal else None) - lse.unsqueeze(-1)).exp()
        delta = (grad.to(wide) * output).sum(-1, keepdim=True)
        of_logits = (probabilities * ((grad @ v_BGKD.transpose(-1, -2)).to(wide) - delta) * scale).to(q.dtype)
        of_q.append(of_logits @ k_BGKD)
        of_k += of_logits.transpose(-1, -2) @ q
        of_v += probabilities.to(q.dtype).transpose(-1, -2) @ grad
    return torch.cat(of_q, 2), of_k, of_v


def _logits(q_BGSD: torch.Tensor, k_BGKD: torch.Tensor, scale: float, first: int | None) -> torch.Tensor:
    """Wide [B, G, S, K]; with the number of its first row, masked behind the diagonal."""
    logits = (q_BGSD @ k_BGKD.transpose(-1, -2)).to(torch.promote_types(q_BGSD.dtype, torch.float32)) * scale
    if first is None:
        return logits
    rows = torch.arange(first, first + logits.shape[2], device=logits.device)
    columns = torch.arange(logits.shape[3], device=logits.device)
    return logits.masked_fill(columns > rows[:, None], -torch.inf)
