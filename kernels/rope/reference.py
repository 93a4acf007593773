"""Rotary embedding in place, in torch: "rotate half" (arXiv 2104.09864) of the first R dimensions of every head.

With halves x1, x2: y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin, in fp32 (fp64 for fp64), rounded once.

Shapes: S tokens, B sequences, N heads, D head size, H = R / 2, P positions.
"""

from __future__ import annotations

import torch

from ..qkv_rope.reference import tables_of_tokens


def rotate_(
    heads_SBND: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    inverse: bool,
) -> None:
    """Rotate heads [S, B, N, D] where they are, by the opposite angle if inverse; the rest as in `rope_`."""
    cos, sin = tables_of_tokens(cos, sin, positions, heads_SBND[..., 0])
    if inverse:
        sin = -sin
    wide, half = heads_SBND.to(cos.dtype), cos.shape[-1]
    first, second = wide[..., :half], wide[..., half : 2 * half]
    turned = torch.mul(first, cos, out=first.new_empty(first.shape)).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(turned)
    if wide is not heads_SBND:
        heads_SBND.copy_(wide)
