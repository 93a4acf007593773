"""Triton's interpreter with the rounding of a device.

The interpreter of Triton 3.7.1 cuts fp32 to bf16 by dropping bits, where devices round to nearest even: its results
are off by up to a whole unit, and a rule that asks for correct rounding fails, or has to be loosened for all.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def round_as_a_device_does() -> None:
    """Replace the interpreter's conversion of fp32 to bf16, for the whole process.

    Call it before kernels run, in a process that was started with TRITON_INTERPRET=1: Triton decides at import.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1", "start the process with TRITON_INTERPRET=1"
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_rounding(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        values = np.array(src.data, dtype=np.float32)  # a copy: constants are read-only
        bits = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, dst_type.scalar)

    interpreter.InterpreterBuilder.cast_impl = cast_rounding
