"""Imported once by the server that ranks are forked from, so that no rank pays for these imports."""

from __future__ import annotations

import gc
import importlib

from megatron_qwen.parallel.device import install_cpu_platform

install_cpu_platform()
for _name in (
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron_qwen.checkpoint.torch_dist",
    "megatron_qwen.training.loop",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "torch._dynamo",  # by torch.optim, on its first use
):
    importlib.import_module(_name)
gc.freeze()  # what is imported stays: collections of garbage in the ranks need not walk it
