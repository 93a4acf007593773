"""What is computed once from a tensor and serves all layers that get the same one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class PerTensor:
    """What was computed from a tensor, kept as long as the tensor object lives and nobody writes to it.

    A buffer that is filled anew for each batch is another tensor each time. Of tensors made in inference mode torch
    counts no writes: those must not be written to.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._results: dict[int, tuple[weakref.ref[torch.Tensor], int, Any]] = {}

    def get(self, tensor: torch.Tensor, compute: Callable[[], Any]) -> Any:
        """Return the result for this very tensor object, computed by the first call."""
        key, version = id(tensor), 0 if tensor.is_inference() else tensor._version
        found = self._results.get(key)
        if found is None or found[0]() is not tensor or found[1] != version:
            with torch.inference_mode(False):  # so that what was made while generating text serves a training step, too
                found = weakref.ref(tensor, lambda _: self._results.pop(key, None)), version, compute()
            self._results[key] = found
        return found[2]
