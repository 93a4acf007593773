from __future__ import annotations

from .op import swiglu

__all__ = ["swiglu"]
