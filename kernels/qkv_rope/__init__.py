from __future__ import annotations

from .op import qkv_rope
from .tables import context_parallel_positions, packed_positions, rope_tables

__all__ = ["context_parallel_positions", "packed_positions", "qkv_rope", "rope_tables"]
