"""Launches of the grouped MLP in Triton: which kernel works on what, forward and backward.

Forward: up (gather, both halves of W1, SwiGLU), down (W2, the rows' weights), combine (each token's rows and the shared
expert's). Backward: down and SwiGLU, up, combine, and the two gradients of matrices. No result depends on the order in
which programs end, and the host waits for nothing.

Shapes: T tokens, R routed rows, E experts, k experts per token, H hidden size, F and Fs widths.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..column_sum import multiprocessors
from . import kernel, rows
from .reference import Gradients, Sinks

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Matrices start at multiples of this many elements where all do.
ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """What all launches of a call share; see kernel.py for the schedule."""

    x: torch.Tensor
    weights: torch.Tensor
    offsets: torch.Tensor
    source: torch.Tensor | None
    positions: torch.Tensor | None
    fc1: list[torch.Tensor]
    fc2: list[torch.Tensor]
    gate: torch.Tensor | None
    map_of_tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    routed: int
    shared_tokens: int
    num_experts: int
    width: int
    shared_width: int

    @property
    def size(self) -> int:
        return self.x.shape[1]

    @property
    def topk(self) -> int:
        return 1 if self.positions is None else self.positions.shape[1]

    def numbers(self, width: int, shared_width: int) -> int:
        """Length of a flat buffer [R, width] and [T, shared_width]."""
        return self.routed * width + self.shared_tokens * shared_width

    def blocks(self, pairs: bool = False) -> dict[str, Any]:
        """See `_blocks`."""
        return _blocks(self.x, (self.width, self.shared_width), pairs)

    @functools.cached_property
    def gates(self) -> torch.Tensor | None:
        """sigmoid(x g) [T] fp32."""
        if self.gate is None:
            return None
        gates = self.x.new_empty(self.x.shape[0], dtype=torch.float32)
        rows.launch_gate(self.x, self.gate[0], gates)
        return gates


def forward(
    x: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    source: torch.Tensor | None,
    positions: torch.Tensor | None,
    fc1: list[torch.Tensor],
    fc2: list[torch.Tensor],
    shared: list[torch.Tensor],
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, packed and common, empty unless `keep`; arguments as `reference.forward`."""
    if not x.numel():
        return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)
    problem = _problem(x, weights, offsets, source, positions, fc1, fc2, shared)
    hidden = x.new_empty(problem.numbers(problem.width, problem.shared_width))
    packed = _up(problem, hidden=hidden, keep=keep)
    y = x.new_empty(problem.routed + problem.shared_tokens, problem.size)
    _down(problem, hidden, problem.fc2, y, weigh=True)
    kept = problem.numbers(2 * problem.width, 0) if keep else 0
    return _combine(problem, y, None), packed[:kept], packed[kept:]


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    source: torch.Tensor | None,
    positions: torch.Tensor | None,
    packed: torch.Tensor,
    common: torch.Tensor,
    fc1: list[torch.Tensor],
    fc2: list[torch.Tensor],
    shared: list[torch.Tensor],
    sinks: Sinks = (),
) -> Gradients:
    """Return the gradients of x, weights, fc1, fc2 and shared; arguments as `reference.backward`."""
    if not x.numel():
        none = [[torch.zeros_like(each) for each in group] for group in (fc1, fc2, shared)]
        return x.new_empty(x.shape), torch.zeros_like(weights), none[0], none[1], none[2]
    problem = _problem(x, weights, offsets, source, positions, fc1, fc2, shared)
    packed = _together(packed, common) if packed.numel() else _up(problem, hidden=None, keep=True)
    grad_packed = torch.empty_like(packed)
    hidden = x.new_empty(problem.numbers(problem.width, problem.shared_width))
    grad_weights, grad_gates = _activation_backward(problem, grad, packed, grad_packed, hidden)
    grad_logits = None
    if problem.gates is not None and problem.gate is not None:
        grad_logits = grad_gates * problem.gates * (1.0 - problem.gates)
    grad_rows = x.new_empty(problem.routed + problem.shared_tokens, problem.size)
    _down(problem, grad_packed, problem.fc1, grad_rows, weigh=False)
    grad_x = _combine(problem, grad_rows, grad_logits)
    into = _sinks_of(problem, sinks or [None] * (2 * len(fc1) + len(shared)))
    grads1 = _matrix_gradients(problem, grad_packed, x, problem.fc1, into[0])
    grads2 = _matrix_gradients(problem, hidden, grad, problem.fc2, into[1])
    grads_shared = [grads1.pop(), grads2.pop()] if shared else []
    if problem.gate is not None and grad_logits is not None:
        grad_gate = torch.empty_like(problem.gate)
        rows.launch_gate_gradient(grad_logits, x, grad_gate[0])
        grads_shared.append(_poured(grad_gate, sinks[-1] if sinks else None))
    return grad_x, grad_weights, grads1, grads2, grads_shared


def _together(packed: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """Return the buffer that forward cut into these two; compiled code may have moved them apart."""
    if packed.data_ptr() + packed.nbytes == common.data_ptr() and packed.untyped_storage().nbytes() >= (
        packed.storage_offset() * packed.element_size() + packed.nbytes + common.nbytes
    ):
        return packed.as_strided((packed.numel() + common.numel(),), (1,))
    return torch.cat([packed, common]) if common.numel() else packed


def _poured(grad: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    if sink is not None:
        sink.add_(grad)
    return grad


def _problem(
    x: torch.Tensor,
    weights: torch.Tensor,
    offsets: torch.Tensor,
    source: torch.Tensor | None,
    positions: torch.Tensor | None,
    fc1: list[torch.Tensor],
    fc2: list[torch.Tensor],
    shared: list[torch.Tensor],
) -> _Problem:
    width, shared_width = fc2[0].shape[1], shared[1].shape[1] if shared else 0
    block_rows = _blocks(x, (width, shared_width))["BLOCK_ROWS"]
    # Whole tiles, and at most one more per expert that has rows.
    slots = weights.numel() // block_rows + min(len(fc1), weights.numel())
    group = torch.empty(slots, dtype=torch.int32, device=x.device)
    row = torch.empty(slots, dtype=torch.int64, device=x.device)
    count = torch.empty(1, dtype=torch.int64, device=x.device)
    kernel.tile_map_kernel[(triton.cdiv(slots, 128),)](
        offsets, group, row, count, slots, len(fc1), BLOCK_ROWS=block_rows, BLOCK=128
    )
    return _Problem(
        x=x,
        weights=weights,
        offsets=offsets,
        source=source,
        positions=positions,
        fc1=[*fc1, *shared[:1]],
        fc2=[*fc2, *shared[1:2]],
        gate=shared[2] if len(shared) == 3 else None,
        map_of_tiles=(group, row, count),
        routed=weights.numel(),
        shared_tokens=x.shape[0] if shared else 0,
        num_experts=len(fc1),
        width=width,
        shared_width=shared_width,
    )


def _up(problem: _Problem, hidden: torch.Tensor | None, keep: bool) -> torch.Tensor:
    """Fill hidden, if given, with silu(gate) * up; return the packed output of W1, or nothing unless `keep`."""
    packed = problem.x.new_empty(problem.numbers(2 * problem.width, 2 * problem.shared_width) if keep else 0)
    where, alignment = _offsets_of(problem.fc1)
    kernel.up_kernel[_grid(problem)](
        problem.x, problem.source, problem.fc1[0], where, problem.offsets, *problem.map_of_tiles, packed, hidden,
        problem.routed, problem.shared_tokens, problem.num_experts, problem.size, problem.width, problem.shared_width,
        problem.topk, GATHERS=problem.source is not None, KEEPS=keep, ACTIVATES=hidden is not None, ALIGNMENT=alignment,
        **problem.blocks(pairs=True),
    )  # fmt: skip
    return packed


def _down(problem: _Problem, a: torch.Tensor, matrices: list[torch.Tensor], out: torch.Tensor, weigh: bool) -> None:
    """Fill out [R + T, H] with a W2^T, rows weighted; or with a W1 where `matrices` are those."""
    where, alignment = _offsets_of(matrices)
    doubled = 2 if matrices is problem.fc1 else 1
    kernel.down_kernel[_grid(problem)](
        a, problem.source, matrices[0], where, problem.weights, problem.gates, problem.offsets, *problem.map_of_tiles,
        out, problem.routed, problem.shared_tokens, problem.num_experts, problem.size, doubled * problem.width,
        doubled * problem.shared_width, GATHERS=problem.source is not None, GATED=problem.gates is not None,
        WEIGHS=weigh, TRANSPOSED=matrices is problem.fc2, ALIGNMENT=alignment, **problem.blocks(),
    )  # fmt: skip


def _activation_backward(
    problem: _Problem, grad: torch.Tensor, packed: torch.Tensor, grad_packed: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill grad_packed and the weighted hidden; return the gradients of weights, and of the shared expert's [T]."""
    where, alignment = _offsets_of(problem.fc2)
    blocks = problem.blocks(pairs=True)
    columns = triton.cdiv(problem.width, blocks["BLOCK_COLUMNS"])
    shared_columns = triton.cdiv(problem.shared_width, blocks["BLOCK_COLUMNS"])
    numbers = problem.numbers(columns, shared_columns)
    partial = problem.x.new_empty(numbers, dtype=torch.float32)
    kernel.activation_backward_kernel[_grid(problem)](
        grad, problem.source, problem.fc2[0], where, problem.weights, problem.gates, problem.offsets,
        *problem.map_of_tiles, packed, grad_packed, hidden, partial, problem.routed, problem.shared_tokens,
        problem.num_experts, problem.size, problem.width, problem.shared_width, problem.topk,
        GATHERS=problem.source is not None, GATED=problem.gates is not None, ALIGNMENT=alignment, **blocks,
    )  # fmt: skip
    routed, shared = torch.split(partial, [columns * problem.routed, shared_columns * problem.shared_tokens])
    grad_weights = routed.view(columns, problem.routed).sum(0).view(problem.weights.shape)
    return grad_weights, shared.view(shared_columns, problem.shared_tokens).sum(0)


def _combine(problem: _Problem, per_row: torch.Tensor, grad_logits: torch.Tensor | None) -> torch.Tensor:
    """Return [T, H]: each token's rows of per_row [R + T, H], and what flows through the gate; [R, H] if sorted."""
    if problem.positions is None:
        return per_row
    out = problem.x.new_empty(problem.x.shape)
    shared = per_row[problem.routed :] if problem.shared_tokens else None
    rows.launch_combine(per_row, problem.positions, shared, grad_logits, problem.gate, out)
    return out


def _matrix_gradients(
    problem: _Problem, flat: torch.Tensor, x: torch.Tensor, matrices: list[torch.Tensor], sinks: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return flat^T x of each group, or x^T flat for W2; or add it to `sinks`."""
    grads = [torch.empty_like(each) for each in matrices]
    into = sinks or grads
    where, alignment = _offsets_of(into)
    doubled = 2 if matrices is problem.fc1 else 1
    blocks = problem.blocks()
    blocks["BLOCK_WIDTH"] = blocks.pop("BLOCK_ROWS")
    kernel.weight_gradient_kernel[_grid(problem)](
        flat, x, problem.source, problem.offsets, into[0], where, problem.routed, problem.shared_tokens,
        problem.num_experts, problem.size, doubled * problem.width, doubled * problem.shared_width, problem.topk,
        GATHERS=problem.source is not None, TRANSPOSED=matrices is problem.fc2, ADDS=bool(sinks), ALIGNMENT=alignment,
        **blocks,
    )  # fmt: skip
    return grads


def _sinks_of(problem: _Problem, sinks: Sinks) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Sort `sinks` as the matrices are: all of them, or none."""
    count = problem.num_experts
    wanted = (sinks[:count], sinks[count : 2 * count])
    shared = (sinks[2 * count : 2 * count + 1], sinks[2 * count + 1 : 2 * count + 2])
    first, second = (
        [each for each in (*own, *more) if each is not None] for own, more in zip(wanted, shared, strict=True)
    )
    return first, second


def _offsets_of(matrices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Return how many elements behind the first each matrix begins, and a number that divides them all."""
    pointers = tuple(each.data_ptr() for each in matrices)
    return _offsets_of_pointers(pointers, matrices[0].element_size(), matrices[0].device)


@functools.lru_cache(maxsize=256)
def _offsets_of_pointers(pointers: tuple[int, ...], size: int, device: torch.device) -> tuple[torch.Tensor, int]:
    offsets = [(each - pointers[0]) // size for each in pointers]
    return torch.tensor(offsets, device=device), 1 if any(each % ALIGNMENT for each in offsets) else ALIGNMENT


def _grid(problem: _Problem) -> tuple[int]:
    """One program per multiprocessor: each takes the next tile of the schedule until there are none."""
    return (multiprocessors(problem.x.device),)


def _blocks(x: torch.Tensor, widths: tuple[int, int], pairs: bool = False) -> dict[str, Any]:
    """Sizes of tiles and of programs.

    Tiles of gate and up `pairs` are half as wide: with 128 columns they spill on sm_90. So do all large tiles whose
    rows are not multiples of 16 bytes, as every element then has an address of its own.
    """
    aligned = not any(each * x.element_size() % 16 for each in (x.shape[1], *widths))
    if _IS_INTERPRETED:
        # So small that small tensors have several.
        return {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 16, "BLOCK_INNER": 16, "WIDENS": x.dtype == torch.bfloat16}
    if aligned and x.dtype != torch.float32:
        blocks = {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_INNER": 64, "num_warps": 8, "num_stages": 3}
    else:
        blocks = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_INNER": 32, "num_warps": 8, "num_stages": 3}
    return {**blocks, "BLOCK_COLUMNS": blocks["BLOCK_COLUMNS"] // (2 if pairs else 1), "WIDENS": False}
