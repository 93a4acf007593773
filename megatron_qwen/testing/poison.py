"""Outputs and inputs that give a stray read or write away.

A kernel that leaves part of its output unwritten passes every test as long as fresh memory happens to hold zeros, and
one that reads or writes past the end does no visible harm. Here fresh memory holds NaN and has guards around it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

GUARD = 64
"""Elements before and behind a tensor; a multiple of 16 bytes in every dtype, so that alignment stays as it was."""


class PoisonedMemory:
    """The tensors that were allocated inside `poisoned_outputs`, each between two guards."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, int]] = []

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return a contiguous tensor full of NaN (integers: the smallest value) between two guards."""
        numel = torch.Size(shape).numel()
        buffer = torch.full((numel + 2 * GUARD,), poison_value(dtype), dtype=dtype, device=device)
        self._buffers.append((buffer, numel))
        return buffer[GUARD : GUARD + numel].view(shape)

    def check(self) -> None:
        """Raise AssertionError if anything was written outside a tensor."""
        for buffer, numel in self._buffers:
            for where, guard in (("before", buffer[:GUARD]), ("behind", buffer[GUARD + numel :])):
                intact = guard.isnan() if buffer.is_floating_point() else guard == poison_value(buffer.dtype)
                assert intact.all(), (
                    f"{int((~intact).sum())} elements written {where} an output of {numel} {buffer.dtype}"
                )

    @property
    def count(self) -> int:
        """How many tensors were allocated."""
        return len(self._buffers)


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """Return NaN, or the value furthest from anything an index should be."""
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else int(torch.iinfo(dtype).min)


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[PoisonedMemory]:
    """Let torch.empty, torch.empty_like and Tensor.new_empty return poisoned memory; check the guards at the end.

    It replaces torch's functions for the whole process, backward threads included: for tests only.
    """
    memory = PoisonedMemory()
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            wanted = original(*args, **kwargs)
            if wanted.device.type == "meta" or not wanted.is_contiguous():
                return wanted
            return memory.allocate(tuple(wanted.shape), wanted.dtype, wanted.device)

        return allocate

    torch.empty, torch.empty_like = poisoned(empty), poisoned(empty_like)
    torch.Tensor.new_empty = poisoned(new_empty)  # type: ignore[method-assign]
    try:
        yield memory
    finally:
        torch.empty, torch.empty_like = empty, empty_like
        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]
    memory.check()


def surrounded(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of `tensor` with NaN before, behind and, along its last axis, after every row.

    The row distance is that of the tensor plus `GUARD`; a read past a row's end turns up as NaN in a result.
    """
    shape = tuple(tensor.shape)
    rows, width = (tensor.numel() // shape[-1] if shape[-1] else 0), shape[-1]
    buffer = torch.full((rows + 2, width + GUARD), poison_value(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    inside = buffer[1 : rows + 1, :width]
    inside.copy_(tensor.reshape(rows, width))
    return inside.as_strided(shape, _row_strides(shape, width + GUARD), inside.storage_offset())


def _row_strides(shape: tuple[int, ...], distance: int) -> tuple[int, ...]:
    strides = [1]
    step = distance
    for size in reversed(shape[:-1]):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
