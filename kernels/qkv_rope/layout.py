"""The sizes of a packed row, for launches of every backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a packed row: groups, heads per group (query heads + 2), head size, half of the rotated dimensions."""

    groups: int
    per_group: int
    head_dim: int
    half: int
