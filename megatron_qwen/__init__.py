"""Qwen2.5 on Megatron-Core: train, convert and run, on one laptop CPU or hundreds of GPUs.

The public names below are loaded on first use, so that `import megatron_qwen` costs no torch,
megatron, transformers or triton import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "QwenConfig": "megatron_qwen.model.config",
    "build_model": "megatron_qwen.model.build",
    "get_qwen_layer_spec": "megatron_qwen.model.spec",
    "QWEN_LAYER_SPEC": "megatron_qwen.model.spec",
    "load_model": "megatron_qwen.conversion.loading",
    "ParallelLayout": "megatron_qwen.parallel.layout",
}

__all__ = [
    "QWEN_LAYER_SPEC",
    "ParallelLayout",
    "QwenConfig",
    "__version__",
    "build_model",
    "get_qwen_layer_spec",
    "load_model",
    "ops",
]

if TYPE_CHECKING:
    from megatron_qwen import ops
    from megatron_qwen.conversion.loading import load_model
    from megatron_qwen.model.build import build_model
    from megatron_qwen.model.config import QwenConfig
    from megatron_qwen.model.spec import QWEN_LAYER_SPEC, get_qwen_layer_spec
    from megatron_qwen.parallel.layout import ParallelLayout


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("megatron_qwen.ops")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'megatron_qwen' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
