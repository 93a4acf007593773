"""What the CUDA kernels of attention take; apart from cuda.py, which cannot be imported without the extension."""

from __future__ import annotations

import torch

# 16 bytes of a 16-bit dtype: what a thread moves at once, and what TMA wants strides to be a multiple of.
STRIDE_STEP = 8
ALIGNMENT = 16
# kLongestSequence of csrc/include/megatron_qwen/attention.h: positions, and rows for TMA, are 32-bit numbers.
MOST_ROWS = 2**29


def unfit(cos: torch.Tensor | None, **heads: torch.Tensor) -> str:
    """Return why these kernels cannot take such heads [..., rows, heads, D] by name; empty if they can."""
    first = next(iter(heads.values()))
    if first.dtype not in (torch.bfloat16, torch.float16):
        return f"its CUDA kernel takes bfloat16 and float16, not {first.dtype}"
    if first.is_cuda and torch.cuda.get_device_capability(first.device)[0] != 9:
        return "its CUDA kernel needs an sm_90 device (H100, H200)"
    for name, each in ((name, each) for name, each in heads.items() if each.numel()):
        if each.shape[-3] > MOST_ROWS:
            return f"its CUDA kernel takes {MOST_ROWS} rows, and {name} has {each.shape[-3]}"
        if each.data_ptr() % ALIGNMENT:
            return f"its CUDA kernel takes heads that start at multiples of {ALIGNMENT} bytes, and {name} does not"
        steps = [stride for stride, size in zip(each.stride()[:-1], each.shape[:-1], strict=True) if size > 1]
        if any(stride <= 0 or stride % STRIDE_STEP for stride in steps):
            return (
                f"its CUDA kernel takes strides of multiples of {STRIDE_STEP} numbers, and {name} has {each.stride()}: "
                "call .contiguous() first"
            )
    if cos is not None and cos.data_ptr() % ALIGNMENT:
        return f"its CUDA kernel takes tables that start at multiples of {ALIGNMENT} bytes"
    return ""
