"""Reads the optimizer state of a finished output again and compares it with the source, as `engine.verification`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_qwen.conversion.engine.verification import compare_rows
from megatron_qwen.conversion.engine.write import read_in_parallel
from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.conversion.loading import open_source
from megatron_qwen.conversion.optimizer.opening import open_optimizer
from megatron_qwen.conversion.optimizer.state import OptimizerReader, Role
from megatron_qwen.conversion.options import ConversionOptions
from megatron_qwen.conversion.parameters import Parameter, parameters

_STATE_BYTES = 4  # of a master weight or moment


def verify_optimizer(
    folder: Path,
    source: WeightSource,
    options: ConversionOptions,
    *,
    threads: int,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Compare every master weight and moment of an output, bit for bit, with the source.

    Args:
        folder: the output, still in its staging folder.
        source: what was resharded.
        options: of the conversion.
        threads: that read.
        is_stopped: asked before each tensor.

    Raises:
        CorruptInputError: naming what differs.
        Interrupted: `is_stopped` said so.
    """
    optimizer = open_optimizer(source) if options.optimizer else None
    if optimizer is None:
        return
    output = open_source(folder, allow_pickle=True, allow_unfinished=True)  # our own files
    written = open_optimizer(output)
    assert written is not None, folder
    wanted = OptimizerReader(optimizer, source, distributed=options.distributed_optimizer)
    found = OptimizerReader(written, output)
    work = [
        partial(_compare, parameter, role, found, wanted, is_stopped)
        for parameter in parameters(source.config)
        for role in wanted.roles
    ]
    read_in_parallel(work, threads)


def _compare(
    parameter: Parameter, role: Role, found: OptimizerReader, wanted: OptimizerReader, is_stopped: Callable[[], bool]
) -> None:
    compare_rows(
        f"{role} of {parameter.megatron_name}",
        parameter.shape[0],
        math.prod(parameter.shape[1:]) * _STATE_BYTES,
        found=partial(found.rows, parameter, role),
        expected=partial(wanted.rows, parameter, role),
        is_stopped=is_stopped,
    )
