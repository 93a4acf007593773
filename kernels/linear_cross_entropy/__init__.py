from __future__ import annotations

from .op import TokenLosses, linear_cross_entropy, linear_cross_entropy_terms
from .reference import WeightGradient

__all__ = ["TokenLosses", "WeightGradient", "linear_cross_entropy", "linear_cross_entropy_terms"]
