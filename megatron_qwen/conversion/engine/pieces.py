"""Tensors of an output cut into slices of rows, each a piece of work of bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from megatron_qwen.conversion.interfaces import Piece, pwrite_all

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What a slice may hold at once: 4 MiB read and as much again for parts of it. Large enough for the disk and for torch,
# small enough to stay in the processor's cache from reading to writing.
BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class TensorRows:
    """A tensor that an output holds, made slice by slice.

    Attributes:
        label: its name, for messages.
        shape, dtype: in the output.
        source_dtype: where it is read.
        num_tensors: Hugging Face tensors in it.
        read: given the first row and one past the last (axis 0), returns them in `dtype`; a scalar is one row.
    """

    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source_dtype: torch.dtype
    num_tensors: int
    read: Callable[[int, int], Tensor]

    @property
    def num_rows(self) -> int:
        """Size of axis 0."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        """Values in one row."""
        return math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        """Size in the output."""
        return self.num_rows * self.row_elements * self.dtype.itemsize


def block_bytes(max_memory: int | None, threads: int) -> int:
    """Return how many bytes a slice may hold at once so that all threads work within `max_memory` bytes."""
    return BLOCK_BYTES if max_memory is None else max(1, min(BLOCK_BYTES, max_memory // threads))


def row_pieces(tensor: TensorRows, offset: int, block: int) -> Iterator[Piece]:
    """Yield in order the pieces that write `tensor` at `offset` of a file; each holds up to `block` bytes or a row."""
    if tensor.num_bytes == 0:
        return
    row_bytes = tensor.row_elements * tensor.dtype.itemsize
    # Read, gathered from parts, cast; a cast is compared in fp32 with what it was.
    is_cast = tensor.source_dtype != tensor.dtype
    peak = tensor.row_elements * (2 * tensor.source_dtype.itemsize + (tensor.dtype.itemsize + 12 if is_cast else 0))
    step = max(1, block // peak)
    for begin in range(0, tensor.num_rows, step):
        end = min(begin + step, tensor.num_rows)
        span = (offset + begin * row_bytes, offset + end * row_bytes)
        yield Piece(
            label=tensor.label,
            num_tensors=tensor.num_tensors if end == tensor.num_rows else 0,
            num_bytes=span[1] - span[0],
            peak_bytes=(end - begin) * peak,
            write=partial(_write_rows, tensor, begin, end, span[0]),
            spans=(span,),
        )


def _write_rows(tensor: TensorRows, begin: int, end: int, offset: int, descriptor: int) -> None:
    import torch

    rows = tensor.read(begin, end)
    expected = (end - begin) * tensor.row_elements
    assert (rows.numel(), rows.dtype) == (expected, tensor.dtype), (tensor.label, rows.shape, rows.dtype, expected)
    pwrite_all(descriptor, memoryview(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data), offset)
