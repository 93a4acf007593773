"""What a conversion checks in the numbers themselves: finite values, and what a cast to another dtype changes."""

from __future__ import annotations

import logging
import math
import threading

import torch
from torch import Tensor

from megatron_qwen.errors import NumericsError

logger = logging.getLogger(__name__)


class NumericGuard:
    """Checks and casts the tensors of one conversion; safe to use from several threads.

    Attributes:
        dtype: cast to this; None keeps each tensor's own.
        allow_nonfinite: log NaN and infinity instead of refusing them.
        max_cast_error: largest |x - cast(x)| seen so far.
        num_cast: tensors whose values a cast changed.
    """

    def __init__(self, dtype: torch.dtype | None, *, allow_nonfinite: bool = False) -> None:
        self.dtype = dtype
        self.allow_nonfinite = allow_nonfinite
        self.max_cast_error = 0.0
        self.num_cast = 0
        self._lock = threading.Lock()

    def check(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor` in the wanted dtype.

        Raises:
            NumericsError: it holds NaN or infinity, or overflows in the wanted dtype.
        """
        is_finite = self._check_finite(name, tensor)
        if self.dtype is None or tensor.dtype == self.dtype:
            return tensor
        cast = tensor.to(self.dtype)
        if is_finite and not _is_finite(cast):
            overflow = torch.isinf(cast)
            raise NumericsError(
                f"{name}: {int(overflow.sum())} of {tensor.numel()} values overflow {self.dtype} (largest "
                f"{float(tensor.abs().max()):.4g}, limit {torch.finfo(self.dtype).max:.4g}); use bfloat16 or float32"
            )
        if torch.finfo(self.dtype).bits < torch.finfo(tensor.dtype).bits or self.dtype == torch.float16:
            self._record_error(tensor, cast)
        return cast

    def _check_finite(self, name: str, tensor: Tensor) -> bool:
        if _is_finite(tensor):
            return True
        bad = ~torch.isfinite(tensor)
        index = tuple(int(i) for i in bad.nonzero()[0])
        text = f"{name}: {int(bad.sum())} of {tensor.numel()} values are NaN or infinite, the first at {index}"
        if not self.allow_nonfinite:
            raise NumericsError(f"{text}. The checkpoint is damaged; --allow-nonfinite converts it nevertheless")
        logger.warning("%s", text)
        return False

    def _record_error(self, tensor: Tensor, cast: Tensor) -> None:
        error = float((tensor.float() - cast.float()).abs().nan_to_num(0.0, 0.0, 0.0).max()) if tensor.numel() else 0.0
        with self._lock:
            self.max_cast_error = max(self.max_cast_error, error)
            self.num_cast += error > 0.0


def _is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass without a mask."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach().reshape(-1))
    return math.isfinite(float(low)) and math.isfinite(float(high))
