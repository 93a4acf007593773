"""What forward and backward of the grouped MLP take, in every backend.

Shapes: T tokens, k experts per token, E experts of this rank, R rows in expert order (T k, or as many as came from
other ranks), H hidden size, F and Fs widths of a routed and the shared expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs as launches see them: the shared expert, which every token goes to, is one more group."""

    inputs: Inputs

    @property
    def x(self) -> torch.Tensor:
        """[T, H], or [R, H]."""
        return self.inputs.x

    @property
    def fc1(self) -> list[torch.Tensor]:
        """All groups' W1."""
        return [*self.inputs.fc1, *self.inputs.shared[:1]]

    @property
    def fc2(self) -> list[torch.Tensor]:
        """All groups' W2."""
        return [*self.inputs.fc2, *self.inputs.shared[1:2]]

    @property
    def gate(self) -> torch.Tensor | None:
        """The shared expert's, [1, H]."""
        return self.inputs.shared[2] if len(self.inputs.shared) == 3 else None

    @property
    def routed(self) -> int:
        """R."""
        return self.inputs.weights.numel()

    @property
    def shared_tokens(self) -> int:
        """T; 0 without a shared expert."""
        return self.x.shape[0] if self.inputs.shared else 0

    def numbers(self, width: int, shared_width: int) -> int:
        """Length of a flat buffer [R, width] and [T, shared_width]."""
        return self.routed * width + self.shared_tokens * shared_width

    def sort_sinks(self, sinks: Sinks) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the sinks of `fc1` and those of `fc2`; both are empty if there are none."""
        count = len(self.inputs.fc1)
        wanted = (sinks[:count], sinks[count : 2 * count])
        shared = (sinks[2 * count : 2 * count + 1], sinks[2 * count + 1 : 2 * count + 2])
        first, second = (
            [each for each in (*own, *more) if each is not None] for own, more in zip(wanted, shared, strict=True)
        )
        return first, second
