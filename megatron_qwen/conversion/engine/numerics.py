"""What a conversion checks in the numbers themselves: finite values, and what a cast to another dtype changes.

    weights = CheckedWeights(source, dtype=torch.float16)
    weights.rows(parameter, 0, 128)          # as the source's, but checked and cast

A slice is checked while it is in the processor's cache, in one pass. Only where one fails is the whole tensor read, to
say how many values are bad and where the first is.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_qwen.conversion.parameters import WHOLE, Parameter, Shard
from megatron_qwen.errors import NumericsError

if TYPE_CHECKING:
    from megatron_qwen.conversion.interfaces import WeightSource

logger = logging.getLogger(__name__)

_SCAN_BYTES = 8 * 2**20


class CheckedWeights:
    """The tensors of a source, checked and cast; safe to use from several threads.

    Attributes:
        source: where they come from.
        dtype: cast to this; None keeps each tensor's own.
        allow_nonfinite: log NaN and infinity, once per parameter, instead of refusing them.
        max_cast_error: largest |x - cast(x)| seen so far.
        changed: parameters of which a cast changed values.
    """

    def __init__(
        self, source: WeightSource, dtype: torch.dtype | None = None, *, allow_nonfinite: bool = False
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.allow_nonfinite = allow_nonfinite
        self.max_cast_error = 0.0
        self.changed: set[str] = set()
        self._nonfinite: set[str] = set()
        self._lock = threading.Lock()

    def rows(self, parameter: Parameter, begin: int, end: int) -> Tensor:
        """Return rows of the parameter as Megatron lays it out.

        Raises:
            NumericsError: the tensor holds NaN or infinity, or overflows in `dtype`; counted over the whole tensor.
        """
        return self._convert(parameter, self.source.rows(parameter, begin, end))

    def hf_rows(self, parameter: Parameter, index: int, begin: int, end: int) -> Tensor:
        """Return rows of the parameter's Hugging Face tensor number `index`; raises as `rows`."""
        return self._convert(parameter, self.source.hf_rows(parameter, index, begin, end))

    def read(self, parameter: Parameter, shard: Shard = WHOLE, *, vocabulary_rows: int | None = None) -> Tensor:
        """Return one tensor-parallel shard of the parameter; raises as `rows`."""
        return self._convert(parameter, self.source.read(parameter, shard, vocabulary_rows=vocabulary_rows))

    def _convert(self, parameter: Parameter, tensor: Tensor) -> Tensor:
        is_all_finite = is_finite(tensor)
        if not is_all_finite:
            self._report_nonfinite(parameter)
        if self.dtype is None or tensor.dtype == self.dtype:
            return tensor
        cast = tensor.to(self.dtype)
        if not is_finite(cast) and bool((torch.isfinite(tensor) & torch.isinf(cast)).any()):
            self._report_overflow(parameter)
        if torch.finfo(self.dtype).bits < torch.finfo(tensor.dtype).bits or self.dtype == torch.float16:
            self._record_error(parameter, tensor, cast)
        return cast

    def _report_nonfinite(self, parameter: Parameter) -> None:
        with self._lock:
            if parameter.megatron_name in self._nonfinite:
                return
            self._nonfinite.add(parameter.megatron_name)
        for index, name in enumerate(parameter.hf_names):
            count, first = 0, None
            for row, tensor in self._scan(parameter, index):
                bad = ~torch.isfinite(tensor)
                if bad.any():
                    count += int(bad.sum())
                    place = [int(i) for i in bad.nonzero()[0]]
                    first = first or (row + place[0], *place[1:])
            if count == 0:
                continue
            total = math.prod(parameter.hf_shapes[index])
            text = f"{name}: {count} of {total} values are NaN or infinite, the first at {first}"
            if not self.allow_nonfinite:
                raise NumericsError(f"{text}. The checkpoint is damaged; --allow-nonfinite converts it nevertheless")
            logger.warning("%s", text)

    def _report_overflow(self, parameter: Parameter) -> None:
        assert self.dtype is not None
        for index, name in enumerate(parameter.hf_names):
            count, largest = 0, 0.0
            for _, tensor in self._scan(parameter, index):
                finite = torch.isfinite(tensor)
                count += int((finite & torch.isinf(tensor.to(self.dtype))).sum())
                largest = max(largest, float(tensor.abs().where(finite, 0).max()))
            if count:
                raise NumericsError(
                    f"{name}: {count} of {math.prod(parameter.hf_shapes[index])} values overflow {self.dtype} (largest "
                    f"{largest:.4g}, limit {torch.finfo(self.dtype).max:.4g}); use bfloat16 or float32"
                )

    def _scan(self, parameter: Parameter, index: int) -> Iterator[tuple[int, Tensor]]:
        rows, *rest = parameter.hf_shapes[index]
        step = max(1, _SCAN_BYTES // (8 * math.prod(rest)))
        for begin in range(0, rows, step):
            yield begin, self.source.hf_rows(parameter, index, begin, min(begin + step, rows))

    def _record_error(self, parameter: Parameter, tensor: Tensor, cast: Tensor) -> None:
        if tensor.numel() == 0:
            return
        error = float((tensor.float() - cast.float()).abs().nan_to_num(0.0, 0.0, 0.0).max())
        with self._lock:
            self.max_cast_error = max(self.max_cast_error, error)
            if error > 0.0:
                self.changed.add(parameter.megatron_name)


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass without a mask."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor.detach().reshape(-1))
    return math.isfinite(float(low)) and math.isfinite(float(high))
