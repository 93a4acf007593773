from __future__ import annotations

from .losses import huggingface_balance_loss, megatron_balance_loss, z_loss
from .op import Routing, moe_routing

__all__ = ["Routing", "huggingface_balance_loss", "megatron_balance_loss", "moe_routing", "z_loss"]
