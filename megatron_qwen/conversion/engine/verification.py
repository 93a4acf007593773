"""Reads a finished output again and compares every value with the source, before the output gets its name."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

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
        partial(_compare, item, index, output, weights, is_stopped, count)
        for item in plan.parameters
        for index in range(len(item.parameter.hf_names))
    ]
    read_in_parallel(work, threads)


def _compare(
    item: PlannedParameter,
    index: int,
    output: WeightSource,
    weights: CheckedWeights,
    is_stopped: Callable[[], bool],
    advance: Advance,
) -> None:
    parameter = item.parameter
    row_bytes = math.prod(parameter.hf_shapes[index][1:]) * max(item.source_dtype.itemsize, item.target_dtype.itemsize)
    compare_rows(
        parameter.hf_names[index],
        parameter.hf_shapes[index][0],
        row_bytes,
        found=partial(output.hf_rows, parameter, index),
        expected=partial(weights.hf_rows, parameter, index),
        is_stopped=is_stopped,
        advance=advance,
    )


def compare_rows(
    name: str,
    num_rows: int,
    row_bytes: int,
    *,
    found: Callable[[int, int], Tensor],
    expected: Callable[[int, int], Tensor],
    is_stopped: Callable[[], bool],
    advance: Advance = lambda tensors, num_bytes: None,
) -> None:
    """Compare a tensor of an output with what it has to be, some rows at a time.

    Args:
        name: for messages.
        num_rows: of the tensor.
        row_bytes: of one row, at most.
        found: reads rows of the output, from the first number to the second.
        expected: returns the same rows as they have to be.
        is_stopped: asked before each slice.
        advance: told (tensors, bytes) done.

    Raises:
        CorruptInputError: naming the rows that differ.
        Interrupted: `is_stopped` said so.
    """
    step = max(1, BLOCK_BYTES // (4 * row_bytes))
    for begin in range(0, num_rows, step):
        if is_stopped():
            raise Interrupted("interrupted")
        end = min(begin + step, num_rows)
        one, two = (read(begin, end).contiguous() for read in (found, expected))
        if one.dtype != two.dtype or not torch.equal(one.view(torch.uint8), two.view(torch.uint8)):
            raise CorruptInputError(
                f"{name}: rows {begin} to {end} of the output are not those of the source. The disk or the memory of "
                "this machine returned other bytes than it was given; the output is deleted"
            )
        advance(int(end == num_rows), one.nbytes)
