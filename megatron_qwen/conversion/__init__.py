"""Checkpoints between Hugging Face and Megatron; the public names are loaded on first use, without torch before.

names, transforms, parameters, rows    the table: which tensor is which, how it is rearranged, row by row
interfaces                             what a source and an output are
formats/                               hf, torch_dist, legacy: each a source and an output; what goes beside them
plan                                   the proof, from headers and configuration alone
options, run, report                   import_hf, export_hf, reshard: what is asked, done and said
outputs, resharding                    the files of a target, of weights and of a training step
optimizer/                             optimizer state, for resharding
engine/                                writes any output: threads, memory budget, staging, resume, verification
comparison/                            verify: bits, digests, logits
loading, upcycle                       weights into a model; a MoE from a dense model

docs/conversion.md has the longer map.
"""

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
