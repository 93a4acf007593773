"""How operations call the CUDA kernels of `megatron_qwen._C`: addresses, dtype names, and the stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def address(tensor: torch.Tensor | None) -> int:
    """Return where a tensor's data begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@contextlib.contextmanager
def stream(device: torch.device) -> Iterator[int]:
    """Make `device` the current one, and give the handle of torch's current stream on it."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream
