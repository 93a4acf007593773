"""Rotary embedding in place, in torch: "rotate half" (arXiv 2104.09864) of the first R dimensions of every head.

With halves x1, x2: y1 = x1 cos - x2 sin and y2 = x2 cos + x1 sin, in fp32 (fp64 for fp64), rounded once.

Shapes: S tokens, B sequences, N heads, D head size, H = R / 2, P positions.
"""

from __future__ import annotations

import torch

from ..qkv_rope.reference import rotate, tables_of_tokens


def rotate_(
    heads_SBND: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    inverse: bool,
) -> None:
    """Rotate heads [S, B, N, D] where they are, by the opposite angle if inverse; the rest as in `rope_`."""
    cos, sin = tables_of_tokens(cos, sin, positions, heads_SBND[..., 0])
    wide = heads_SBND.to(cos.dtype)
    heads_SBND.copy_(rotate(wide, cos, -sin if inverse else sin))
