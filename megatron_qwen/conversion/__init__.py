"""Checkpoints between Hugging Face and Megatron; the public names are loaded on first use, without torch before."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "export_hf": "run",
    "import_hf": "run",
    "load_model": "loading",
    "load_weights_into": "loading",
    "read_config": "loading",
    "reshard": "run",
    "plan_export": "plan",
    "plan_import": "plan",
    "verify": "comparison.weights",
    "compare_logits": "comparison.logits",
    "compare_manifests": "comparison.manifests",
    "make_recipe": "upcycle",
    "upcycle_hf": "upcycle",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'megatron_qwen.conversion' has no attribute {name!r}")
    return getattr(importlib.import_module(f"megatron_qwen.conversion.{_PUBLIC[name]}"), name)
