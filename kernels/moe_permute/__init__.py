from __future__ import annotations

from .op import ExpertOrder, expert_order, moe_permute, moe_unpermute

__all__ = ["ExpertOrder", "expert_order", "moe_permute", "moe_unpermute"]
