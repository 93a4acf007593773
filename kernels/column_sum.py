"""The second stage of gradients that sum over tokens: partial sums of each program, added in a fixed order.

The first stage writes one fp32 row per program. Without atomics the result does not depend on which program ends first.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

BLOCK_ROWS = 32
BLOCK_COLUMNS = 32
# Programs of a first stage per multiprocessor: enough to hide one another's reductions, few enough partial rows.
PROGRAMS_PER_MULTIPROCESSOR = 4


@triton.jit
def column_sum_kernel(partial_ptr, out_ptr, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Write out [columns] of partial [rows, columns], contiguous fp32; a program per block of columns."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        here = (first + row).to(tl.int64)[:, None]
        inside = (here < rows) & (column[None, :] < columns)
        total += tl.load(partial_ptr + here * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < columns)


def launch_column_sum(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out [columns] with the sums of partial [rows, columns], contiguous fp32."""
    rows, columns = partial.shape
    grid = (triton.cdiv(columns, BLOCK_COLUMNS),)
    column_sum_kernel[grid](partial, out, rows, columns, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLUMNS=BLOCK_COLUMNS)


def programs_of_first_stage(rows: int, device: torch.device) -> int:
    """Return how many programs share `rows` rows on this device."""
    return min(rows, PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # Compiled only: as on an H100. Interpreted: a few programs, so that there are partial sums to add.
    return 132 if device.type == "meta" else 1
