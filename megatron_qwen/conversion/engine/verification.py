"""Reads a finished output again and compares every value with the source, before the output gets its name."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megatron_qwen.conversion.engine.numerics import CheckedWeights
from megatron_qwen.conversion.engine.pieces import BLOCK_BYTES
from megatron_qwen.conversion.engine.write import Advance, read_in_parallel
from megatron_qwen.conversion.interfaces import WeightSource
from megatron_qwen.conversion.loading import open_source
from megatron_qwen.conversion.plan import ConversionPlan, PlannedParameter
from megatron_qwen.errors import CorruptInputError, Interrupted


def verify_output(
    folder: Path,
    plan: ConversionPlan,
    weights: CheckedWeights,
    *,
    threads: int,
    advance: Advance = lambda tensors, num_bytes: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Compare each Hugging Face tensor of the output, bit for bit, with the source (after the cast asked for).

    Args:
        folder: the output, still in its staging folder.
        plan: what was converted.
        weights: the source.
        threads: that read.
        advance: told (tensors, bytes) done, from one thread at a time.
        is_stopped: asked before each tensor.

    Raises:
        CorruptInputError: naming tensor and rows that differ.
        Interrupted: `is_stopped` said so.
    """
    output = open_source(folder, allow_pickle=True, allow_unfinished=True)  # our own files
    lock = threading.Lock()

    def count(tensors: int, num_bytes: int) -> None:
        with lock:
            advance(tensors, num_bytes)

    work = [
        partial(_compare, item, index, output, weights, count, is_stopped)
        for item in plan.parameters
        for index in range(len(item.parameter.hf_names))
    ]
    read_in_parallel(work, threads)


def _compare(
    item: PlannedParameter,
    index: int,
    output: WeightSource,
    weights: CheckedWeights,
    advance: Advance,
    is_stopped: Callable[[], bool],
) -> None:
    parameter = item.parameter
    rows = parameter.hf_shapes[index][0]
    row_bytes = math.prod(parameter.hf_shapes[index][1:]) * max(item.source_dtype.itemsize, item.target_dtype.itemsize)
    step = max(1, BLOCK_BYTES // (4 * row_bytes))
    for begin in range(0, rows, step):
        if is_stopped():
            raise Interrupted("interrupted")
        end = min(begin + step, rows)
        found = output.hf_rows(parameter, index, begin, end).contiguous()
        expected = weights.hf_rows(parameter, index, begin, end).contiguous()
        if found.dtype != expected.dtype or not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            raise CorruptInputError(
                f"{parameter.hf_names[index]}: rows {begin} to {end} of the output are not those of the source. The "
                "disk or the memory of this machine returned other bytes than it was given; the output is deleted"
            )
        advance(int(end == rows), found.nbytes)
