"""Imported once by the server that `forked.py` forks ranks from, so that no rank pays for these imports."""

from __future__ import annotations

import importlib

from megatron_qwen.parallel.device import install_cpu_platform

install_cpu_platform()
for _name in ("megatron.core.dist_checkpointing", "megatron.core.optimizer", "megatron_qwen.checkpoint.torch_dist"):
    importlib.import_module(_name)
