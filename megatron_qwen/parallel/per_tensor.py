"""What is computed once from a tensor and serves all layers that get the same one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class PerTensor:
    """What was computed from a tensor, kept as long as the tensor object lives."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._results: dict[int, tuple[weakref.ref[torch.Tensor], Any]] = {}

    def get(self, tensor: torch.Tensor, compute: Callable[[], Any]) -> Any:
        """Return the result for this very tensor object, computed by the first call."""
        key = id(tensor)
        found = self._results.get(key)
        if found is None or found[0]() is not tensor:
            found = weakref.ref(tensor, lambda _: self._results.pop(key, None)), compute()
            self._results[key] = found
        return found[1]
