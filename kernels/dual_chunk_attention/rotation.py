"""Queries at the positions of a variant and keys at theirs, and the way back of their gradients.

Shapes: B sequences, S, K tokens of q and k, H, G heads, D head size.
"""

from __future__ import annotations

import torch

from ..qkv_rope.reference import rotate
from . import layout
from .request import AttentionRequest, Sequences


class Rotation:
    """The rotations of one sequence of a request. Computed in the dtype of the tables; heads are rounded once."""

    def __init__(self, request: AttentionRequest, each: Sequences, device: torch.device) -> None:
        self._request = request
        self._each = each
        self._device = device

    def keys(self, k_BKGD: torch.Tensor) -> torch.Tensor:
        """All keys of the sequence, rotated."""
        if self._request.tables is None or self._request.keys_rotated:
            return k_BKGD
        return self._turn(k_BKGD, self._key_positions(k_BKGD.shape[1]), 1.0).to(k_BKGD.dtype)

    def keys_back(self, grad_BKGD: torch.Tensor) -> torch.Tensor:
        """The gradient of the keys from that of rotated ones, wide."""
        if self._request.tables is None or self._request.keys_rotated:
            return grad_BKGD
        return self._turn(grad_BKGD, self._key_positions(grad_BKGD.shape[1]), -1.0)

    def queries(self, q_BSHD: torch.Tensor, first: int, last: int, variant: int) -> torch.Tensor:
        """Rows first to last of the sequence's queries, rotated for a variant and times their logit_scale.

        The factor goes in before the one rounding, so it costs no accuracy.
        """
        q_BSHD = q_BSHD[:, first:last]
        if self._request.tables is None and self._request.logit_scale is None:
            return q_BSHD
        turned = self._turn(q_BSHD, self._query_positions(first, last, variant), 1.0)
        return self._scaled(turned, first, last).to(q_BSHD.dtype)

    def queries_back(self, grad_BSHD: torch.Tensor, first: int, last: int, variant: int) -> torch.Tensor:
        """The gradient of those rows from that of `queries`, wide."""
        turned = self._turn(grad_BSHD, self._query_positions(first, last, variant), -1.0)
        return self._scaled(turned, first, last)

    def _scaled(self, heads_BSHD: torch.Tensor, first: int, last: int) -> torch.Tensor:
        if self._request.logit_scale is None:
            return heads_BSHD
        return heads_BSHD * self._request.logit_scale[self._each.queries][first:last, None, None]

    def _turn(self, heads: torch.Tensor, positions: torch.Tensor, sign: float) -> torch.Tensor:
        """Heads [B, S, H, D] at positions [S], wide; sign -1 for the transpose."""
        if self._request.tables is None:
            return heads
        cos, sin = (table[positions].unsqueeze(1) for table in self._request.tables)
        return rotate(heads.to(cos.dtype), cos, sign * sin)

    def _key_positions(self, count: int) -> torch.Tensor:
        columns = self._each.key_start + torch.arange(count, device=self._device)
        return columns if self._request.chunks is None else layout.key_positions(self._request.chunks, columns)

    def _query_positions(self, first: int, last: int, variant: int) -> torch.Tensor:
        rows = self._each.query_start + torch.arange(first, last, device=self._device)
        return rows if self._request.chunks is None else layout.query_positions(self._request.chunks, rows)[variant]
