"""Bias, rotary embedding and split of Megatron-Core's packed QKV projection, in torch.

The packed row holds G groups, each of M query heads, one key head and one value head of D numbers:
q q .. q k v | q q .. q k v | ... Query and key heads are rotated on their first R dimensions ("rotate half",
arXiv 2104.09864): with halves x1, x2, y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin.

Computed in fp32 (fp64 for fp64) and rounded once; the tables stay in fp32, unlike in Megatron-Core, which rounds them
to the dtype of the activations.

Shapes: ... leading axes [S, B] or [T], W = G (M + 2) D, H = R / 2.
"""

from __future__ import annotations

import torch


def forward(
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor | None,
    positions: torch.Tensor | None,
    groups: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q [..., G M, D], k and v [..., G, D], contiguous; arguments as in `qkv_rope`."""
    wide = packed.to(torch.promote_types(packed.dtype, torch.float32))
    if bias is not None:
        wide = wide + bias
    heads = wide.reshape(*packed.shape[:-1], groups, packed.shape[-1] // head_dim // groups, head_dim)
    cos, sin = tables_of_tokens(cos, sin, positions, packed)
    rotated = _rotate(heads[..., :-1, :], cos, sin).to(packed.dtype)
    q = rotated[..., :-1, :].flatten(-3, -2).contiguous()
    return q, rotated[..., -1, :].contiguous(), heads[..., -1, :].to(packed.dtype).contiguous()


def backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of packed [..., W], contiguous, and of the bias [W] in fp32 (fp64 for fp64).

    The rotation's transpose is the rotation by the opposite angle.

    Args:
        grads: of q [..., G M, D], k and v [..., G, D].
        packed: gives dtype and shape; its values do not matter.
        cos: as in forward.
        sin: as in forward.
        positions: as in forward.
    """
    groups, head_dim = grads[1].shape[-2:]
    queries = grads[0].shape[-2] // groups
    cos, sin = tables_of_tokens(cos, sin, positions, packed)
    grad_q, grad_k, grad_v = (grad.to(cos.dtype) for grad in grads)
    grad_q = grad_q.reshape(*packed.shape[:-1], groups, queries, head_dim)
    rotated = _rotate(torch.cat([grad_q, grad_k.unsqueeze(-2)], dim=-2), cos, -sin)
    wide = torch.cat([rotated, grad_v.unsqueeze(-2)], dim=-2).reshape(packed.shape)
    return wide.to(packed.dtype), wide.flatten(0, -2).sum(0)


def tables_of_tokens(
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, packed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both tables as [..., 1, 1, H], broadcastable to heads, in the dtype of the computation."""
    if positions is None:
        positions = torch.arange(packed.shape[0], device=packed.device)
    if positions.dim() < packed.dim() - 1:
        positions = positions.unsqueeze(-1)  # one for all sequences of the batch
    dtype = torch.promote_types(packed.dtype, torch.float32)
    of_tokens = (table[positions.long()].to(dtype)[..., None, None, :] for table in (cos, sin))
    return next(of_tokens), next(of_tokens)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
