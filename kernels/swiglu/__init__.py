from __future__ import annotations

from .op import swiglu
from .reference import swiglu_backward_

__all__ = ["swiglu", "swiglu_backward_"]
