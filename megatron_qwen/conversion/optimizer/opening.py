"""The optimizer in a checkpoint, whatever its format."""

from __future__ import annotations

from megatron_qwen.conversion.formats.legacy.source import LegacyFolder
from megatron_qwen.conversion.formats.torch_dist.source import MegatronFolder
from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.conversion.optimizer.legacy import LegacyOptimizer, open_legacy_optimizer
from megatron_qwen.conversion.optimizer.state import OptimizerSource
from megatron_qwen.conversion.optimizer.torch_dist import TorchDistOptimizer, open_torch_dist_optimizer


def open_optimizer(source: WeightSource) -> OptimizerSource | None:
    """Return the optimizer in the checkpoint of `source`, or None if it holds weights alone.

    `source.check_unchanged` covers its files too.

    Raises:
        InputError: its state is damaged, incomplete, or stored by bucket.
    """
    optimizer: LegacyOptimizer | TorchDistOptimizer | None = None
    if isinstance(source, LegacyFolder):
        optimizer = open_legacy_optimizer(source)
    elif isinstance(source, MegatronFolder):
        optimizer = open_torch_dist_optimizer(source.path, source.config)
    if optimizer is not None and isinstance(source, LegacyFolder | MegatronFolder):
        source.watch(optimizer.files())
    return optimizer
