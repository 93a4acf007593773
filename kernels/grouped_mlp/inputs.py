"""What forward and backward of the grouped MLP take, in every backend.

Shapes: T tokens, k experts per token, E experts of this rank, R rows in expert order (T k, or as many as came from
other ranks), H hidden size, F and Fs widths of a routed and the shared expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Sinks = Sequence[torch.Tensor | None]
Gradients = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]


class Inputs(NamedTuple):
    """Rows, where they go, and the matrices; checked by `op.py`.

    Attributes:
        x: [T, H]; [R, H] if the rows are in expert order already.
        weights: [T, k]; [R] if the rows are in expert order already.
        offsets: [E + 1] int64, where each expert's rows begin, and R.
        source: [R] of `expert_order`; None if the rows are in expert order already.
        positions: [T, k] of `expert_order`, or None.
        fc1: E times [2F, H], gate then up.
        fc2: E times [H, F].
        shared: nothing; or [2Fs, H], [H, Fs] and, where the shared expert is gated, [1, H].
    """

    x: torch.Tensor
    weights: torch.Tensor
    offsets: torch.Tensor
    source: torch.Tensor | None
    positions: torch.Tensor | None
    fc1: list[torch.Tensor]
    fc2: list[torch.Tensor]
    shared: list[torch.Tensor]

    @property
    def width(self) -> int:
        """F."""
        return self.fc2[0].shape[1]

    @property
    def shared_width(self) -> int:
        """Fs; 0 without a shared expert."""
        return self.shared[1].shape[1] if self.shared else 0

    @property
    def topk(self) -> int:
        """k; 1 if the rows are in expert order already."""
        return 1 if self.positions is None else self.positions.shape[1]

    @property
    def kept_sizes(self) -> tuple[int, int]:
        """How many numbers the outputs of W1 are: of the routed experts, and of the shared one."""
        return self.weights.numel() * 2 * self.width, self.x.shape[0] * 2 * self.shared_width
