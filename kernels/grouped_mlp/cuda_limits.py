"""What the CUDA kernel of the grouped MLP takes; apart from cuda.py, which cannot be imported without the extension."""

from __future__ import annotations

import torch

from .inputs import Inputs, Sinks

# 16 bytes of a 16-bit dtype: what a thread moves at once, and what TMA wants rows to be a multiple of.
COLUMN_STEP = 8
ALIGNMENT = 16
# kMostGroups of csrc/include/megatron_qwen/grouped_mlp.h.
MOST_GROUPS = 192
MOST_ROWS = 2**31 - 1


def unfit(inputs: Inputs, grad: torch.Tensor | None = None, sinks: Sinks = ()) -> str:
    """Return why these kernels cannot take such inputs; empty if they can. In backward, with y's gradient and sinks."""
    x = inputs.x
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"its CUDA kernel takes bfloat16 and float16, not {x.dtype}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] != 9:
        return "its CUDA kernel needs an sm_90 device (H100, H200)"
    sizes = {"H": x.shape[1], "F": inputs.width, "Fs": inputs.shared_width}
    for name, size in sizes.items():
        if size % COLUMN_STEP:
            return f"its CUDA kernel takes multiples of {COLUMN_STEP}, not {name} = {size}"
    groups = len(inputs.fc1) + len(inputs.shared[:1])
    if groups > MOST_GROUPS:
        return f"its CUDA kernel takes {MOST_GROUPS} experts, a shared one included, not {groups}"
    rows = inputs.weights.numel() + (x.shape[0] if inputs.shared else 0)
    if rows > MOST_ROWS:
        return f"its CUDA kernel takes {MOST_ROWS} rows, not {rows}"
    for sink in sinks:
        if sink is not None and sink.dtype not in (x.dtype, torch.float32):
            return f"its CUDA kernel adds gradients to {x.dtype} and float32, not {sink.dtype}"
    tensors = (x, grad, *inputs.fc1, *inputs.fc2, *inputs.shared, *sinks)
    if any(each is not None and each.data_ptr() % ALIGNMENT for each in tensors):
        return f"its CUDA kernel takes tensors that start at multiples of {ALIGNMENT} bytes"
    return ""
