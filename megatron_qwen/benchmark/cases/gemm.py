"""The ceiling of everything made of matrix products: one square GEMM, as torch runs it on this machine."""

from __future__ import annotations

from typing import Any

import torch

# Large enough to fill the device, and on a GPU to hide the launch.
SIZES = {"cpu": 2048, "cuda": 8192}


class Gemm:
    """C = A B^T of square matrices in the case's dtype, on the device the case runs on; `step` is a Runner's."""

    amount = 1.0

    def __init__(self, *, dtype: str, **_: Any) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = SIZES[device]
        self.flops = 2.0 * size**3
        number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        generator = torch.Generator().manual_seed(0)
        self._a, self._b = (torch.randn(size, size, generator=generator).to(device, number) for _ in range(2))

    def step(self) -> float:
        """Multiply once; returns an element of the product so that the work has an end."""
        return float((self._a @ self._b.T)[0, 0])
