"""Bias, rotary embedding and split of Megatron-Core's packed QKV projection, in torch.

The packed row holds G groups, each of M query heads, one key head and one value head of D numbers:
q q .. q k v | q q .. q k v | ... Query and key heads are rotated on their first R dimensions ("rotate half",
arXiv 2104.09864): with halves x1, x2, y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin.

Computed in fp32 (fp64 for fp64) and rounded once; the tables stay in fp32, unlike in Megatron-Core, which rounds them
to the dtype of the activations. Results are written where they belong, without a concatenation: this is also what a
CPU trains with.

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
    cos, sin = tables_of_tokens(cos, sin, positions, packed)
    lead, heads = packed.shape[:-1], packed.shape[-1] // head_dim
    per_group = groups, heads // groups
    # Value heads are rotated too, to no avail: one run over all heads takes half the time of a run per group.
    rotated = rotate(torch.unflatten(wide, -1, (heads, head_dim)), cos, sin).view(*lead, *per_group, head_dim)
    q = packed.new_empty(*lead, groups, heads // groups - 2, head_dim).copy_(rotated[..., :-2, :])
    k = packed.new_empty(*lead, groups, head_dim).copy_(rotated[..., -2, :])
    v = packed.new_empty(*lead, groups, head_dim).copy_(torch.unflatten(wide, -1, (*per_group, head_dim))[..., -1, :])
    return q.flatten(-3, -2), k, v


def backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    packed: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    with_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of packed [..., W], contiguous, and of the bias [W], if any, in fp32 (fp64 for fp64).

    The rotation's transpose is the rotation by the opposite angle.

    Args:
        grads: of q [..., G M, D], k and v [..., G, D].
        packed: gives dtype and shape; its values do not matter.
        cos: as in forward.
        sin: as in forward.
        positions: as in forward.
        with_bias: whether there was a bias.
    """
    groups, head_dim = grads[1].shape[-2:]
    cos, sin = tables_of_tokens(cos, sin, positions, packed)
    packed_grads = torch.empty(packed.shape, dtype=cos.dtype, device=packed.device)
    per_group = groups, packed.shape[-1] // head_dim // groups
    heads = packed_grads.view(*packed.shape[:-1], *per_group, head_dim)
    heads[..., :-2, :] = torch.unflatten(grads[0], -2, (groups, per_group[1] - 2))
    heads[..., -2, :] = grads[1]
    wide = rotate(heads.flatten(-3, -2), cos, -sin).view(heads.shape)
    wide[..., -1, :] = grads[2]
    wide = wide.view(packed.shape)
    return wide.to(packed.dtype), wide.flatten(0, -2).sum(0) if with_bias else None


def tables_of_tokens(
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None, packed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both tables as [..., 1, H], broadcastable to heads, in the dtype of the computation."""
    dtype = torch.promote_types(packed.dtype, torch.float32)
    if positions is None:
        of_tokens = [table[: packed.shape[0]] for table in (cos, sin)]
    else:
        of_tokens = [table[positions.long()] for table in (cos, sin)]
    if of_tokens[0].dim() < packed.dim():
        of_tokens = [table.unsqueeze(1) for table in of_tokens]  # one position for all sequences of the batch
    wide = [table.to(dtype)[..., None, :] for table in of_tokens]
    return wide[0], wide[1]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return heads [..., N, D] rotated on their first 2 H dimensions; cos and sin [..., 1, H] in their dtype."""
    half = cos.shape[-1]
    first, second = heads[..., :half], heads[..., half : 2 * half]
    rotated = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated[..., half : 2 * half]).addcmul_(first, sin)
    rotated[..., 2 * half :] = heads[..., 2 * half :]
    return rotated
