"""What the extension wants to know of tensors: addresses, names of dtypes, the stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def launching_on(tensor: torch.Tensor) -> Iterator[int]:
    """Make the device of `tensor` the current one and yield the address of its current stream.

    On a CPU it yields 0: there the tests run the kernels emulated.
    """
    if not tensor.is_cuda:
        yield 0
        return
    with torch.cuda.device(tensor.device):
        yield torch.cuda.current_stream().cuda_stream


def address(tensor: torch.Tensor | None) -> int:
    """Return where the elements of `tensor` are; 0 without one."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_name(tensor: torch.Tensor) -> str:
    """Return "float32", "bfloat16", ...; the extension refuses those that its kernels do not take."""
    return str(tensor.dtype).removeprefix("torch.")
