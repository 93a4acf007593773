from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import pytest

from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout


@pytest.fixture(scope="session", autouse=True)
def one_rank() -> Iterator[None]:
    groups.initialize(ParallelLayout())
    yield
    groups.shutdown()


@pytest.fixture(autouse=True)
def _no_aux_losses_of_other_models() -> None:
    """Megatron-Core keeps them in a table of the process, as long as the first MoE model had layers."""
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is None:
        moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        moe_utils.get_moe_layer_wise_logging_tracker().clear()
    else:
        logging = importlib.import_module("megatron.core.transformer.moe.moe_logging")
        logging.get_moe_metrics_tracker()._metrics.clear()
