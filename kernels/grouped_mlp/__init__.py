from __future__ import annotations

from .op import SharedExpert, grouped_mlp, moe_mlp

__all__ = ["SharedExpert", "grouped_mlp", "moe_mlp"]
