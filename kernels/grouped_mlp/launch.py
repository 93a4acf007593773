"""Launches of the grouped MLP in Triton: which kernel works on what, forward and backward.

Forward: up (gather, both halves of W1, SwiGLU), down (W2, the rows' weights), combine (each token's rows and the shared
expert's). Backward: down and SwiGLU, up, combine, and the two gradients of matrices. No result depends on the order in
which programs end, and the host waits for nothing.

Shapes as in inputs.py.
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
from .inputs import Gradients, Inputs, Problem, Sinks

_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Matrices start at multiples of this many elements where all do.
ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class _Problem(Problem):
    """What all launches of a call share; see kernel.py for the schedule, whose last group is the shared expert."""

    map_of_tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    def blocks(self, pairs: bool = False) -> dict[str, Any]:
        """See `_blocks`."""
        return _blocks(self.inputs, pairs)

    @functools.cached_property
    def gates(self) -> torch.Tensor | None:
        """sigmoid(x g) [T] fp32."""
        if self.gate is None:
            return None
        gates = self.x.new_empty(self.x.shape[0], dtype=torch.float32)
        rows.launch_gate(self.x, self.gate[0], gates)
        return gates

    def sizes(self, doubled: bool = False) -> tuple[int, int, int, int, int, int]:
        """R, T, E, H and both widths, which are those of W1's output if `doubled`: arguments of every kernel."""
        factor = 2 if doubled else 1
        widths = factor * self.inputs.width, factor * self.inputs.shared_width
        return self.routed, self.shared_tokens, len(self.inputs.fc1), self.x.shape[1], *widths


def forward(inputs: Inputs, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y and the outputs of W1, as `reference.forward`."""
    x = inputs.x
    if not x.numel():
        return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)
    problem = _problem(inputs)
    hidden = x.new_empty(problem.numbers(inputs.width, inputs.shared_width))
    packed = _up(problem, hidden=hidden, keep=keep)
    y = x.new_empty(problem.routed + problem.shared_tokens, x.shape[1])
    _down(problem, hidden, problem.fc2, y, weigh=True)
    kept = inputs.kept_sizes[0] if keep else 0
    return _combine(problem, y, None), packed[:kept], packed[kept:]


def backward(
    grad: torch.Tensor, inputs: Inputs, packed: torch.Tensor, common: torch.Tensor, sinks: Sinks = ()
) -> Gradients:
    """Return the gradients of x, weights, fc1, fc2 and shared; arguments as `reference.backward`."""
    x, weights, shared = inputs.x, inputs.weights, inputs.shared
    if not x.numel():
        none = [[torch.zeros_like(each) for each in group] for group in (inputs.fc1, inputs.fc2, shared)]
        return x.new_empty(x.shape), torch.zeros_like(weights), none[0], none[1], none[2]
    problem = _problem(inputs)
    packed = _together(packed, common) if packed.numel() else _up(problem, hidden=None, keep=True)
    grad_packed = torch.empty_like(packed)
    hidden = x.new_empty(problem.numbers(inputs.width, inputs.shared_width))
    grad_weights, grad_gates = _activation_backward(problem, grad, packed, grad_packed, hidden)
    grad_logits = None
    if problem.gates is not None:
        grad_logits = grad_gates * problem.gates * (1.0 - problem.gates)
    grad_rows = x.new_empty(problem.routed + problem.shared_tokens, x.shape[1])
    _down(problem, grad_packed, problem.fc1, grad_rows, weigh=False)
    grad_x = _combine(problem, grad_rows, grad_logits)
    into = problem.sort_sinks(sinks)
    grads1 = _matrix_gradients(problem, grad_packed, x, into[0], transposed=False)
    grads2 = _matrix_gradients(problem, hidden, grad, into[1], transposed=True)
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


def _problem(inputs: Inputs) -> _Problem:
    rows, num_experts = inputs.weights.numel(), len(inputs.fc1)
    block_rows = _blocks(inputs)["BLOCK_ROWS"]
    # Whole tiles, and at most one more per expert that has rows.
    slots = rows // block_rows + min(num_experts, rows)
    group = torch.empty(slots, dtype=torch.int32, device=inputs.x.device)
    row = torch.empty(slots, dtype=torch.int64, device=inputs.x.device)
    count = torch.empty(1, dtype=torch.int64, device=inputs.x.device)
    kernel.tile_map_kernel[(triton.cdiv(slots, 128),)](
        inputs.offsets, group, row, count, slots, num_experts, BLOCK_ROWS=block_rows, BLOCK=128
    )
    return _Problem(inputs=inputs, map_of_tiles=(group, row, count))


def _up(problem: _Problem, hidden: torch.Tensor | None, keep: bool) -> torch.Tensor:
    """Fill hidden, if given, with silu(gate) * up; return the packed output of W1, or nothing unless `keep`."""
    inputs, (where, alignment) = problem.inputs, _offsets_of(problem.fc1)
    packed = inputs.x.new_empty(problem.numbers(2 * inputs.width, 2 * inputs.shared_width) if keep else 0)
    kernel.up_kernel[_grid(problem)](
        inputs.x, inputs.source, problem.fc1[0], where, inputs.offsets, *problem.map_of_tiles, packed, hidden,
        *problem.sizes(), inputs.topk, GATHERS=inputs.source is not None, KEEPS=keep, ACTIVATES=hidden is not None,
        ALIGNMENT=alignment, **problem.blocks(pairs=True),
    )  # fmt: skip
    return packed


def _down(problem: _Problem, a: torch.Tensor, matrices: list[torch.Tensor], out: torch.Tensor, weigh: bool) -> None:
    """Fill out [R + T, H] with a W2^T, rows weighted, of W2 [H, F]; or unless `weigh` with a W1 of W1 [2F, H]."""
    inputs, (where, alignment) = problem.inputs, _offsets_of(matrices)
    kernel.down_kernel[_grid(problem)](
        a, inputs.source, matrices[0], where, inputs.weights, problem.gates, inputs.offsets, *problem.map_of_tiles, out,
        *problem.sizes(doubled=not weigh), GATHERS=inputs.source is not None, GATED=problem.gates is not None,
        WEIGHS=weigh, TRANSPOSED=weigh, ALIGNMENT=alignment, **problem.blocks(),
    )  # fmt: skip


def _activation_backward(
    problem: _Problem, grad: torch.Tensor, packed: torch.Tensor, grad_packed: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill grad_packed and the weighted hidden; return the gradients of weights, and of the shared expert's [T]."""
    inputs, (where, alignment) = problem.inputs, _offsets_of(problem.fc2)
    blocks = problem.blocks(pairs=True)
    columns = triton.cdiv(inputs.width, blocks["BLOCK_COLUMNS"])
    shared_columns = triton.cdiv(inputs.shared_width, blocks["BLOCK_COLUMNS"])
    partial = inputs.x.new_empty(problem.numbers(columns, shared_columns), dtype=torch.float32)
    kernel.activation_backward_kernel[_grid(problem)](
        grad, inputs.source, problem.fc2[0], where, inputs.weights, problem.gates, inputs.offsets,
        *problem.map_of_tiles, packed, grad_packed, hidden, partial, *problem.sizes(), inputs.topk,
        GATHERS=inputs.source is not None, GATED=problem.gates is not None, ALIGNMENT=alignment, **blocks,
    )  # fmt: skip
    routed, shared = torch.split(partial, [columns * problem.routed, shared_columns * problem.shared_tokens])
    grad_weights = routed.view(columns, problem.routed).sum(0).view(inputs.weights.shape)
    return grad_weights, shared.view(shared_columns, problem.shared_tokens).sum(0)


def _combine(problem: _Problem, per_row: torch.Tensor, grad_logits: torch.Tensor | None) -> torch.Tensor:
    """Return [T, H]: each token's rows of per_row [R + T, H], and what flows through the gate; [R, H] if sorted."""
    if problem.inputs.positions is None:
        return per_row
    out = problem.x.new_empty(problem.x.shape)
    shared = per_row[problem.routed :] if problem.shared_tokens else None
    rows.launch_combine(per_row, problem.inputs.positions, shared, grad_logits, problem.gate, out)
    return out


def _matrix_gradients(
    problem: _Problem, flat: torch.Tensor, x: torch.Tensor, sinks: list[torch.Tensor], transposed: bool
) -> list[torch.Tensor]:
    """Return flat^T x of each group, W1's; or x^T flat if `transposed`, W2's. With `sinks` add it there instead."""
    inputs = problem.inputs
    grads = [torch.empty_like(each) for each in (problem.fc2 if transposed else problem.fc1)]
    into = sinks or grads
    where, alignment = _offsets_of(into)
    blocks = problem.blocks()
    blocks["BLOCK_WIDTH"] = blocks.pop("BLOCK_ROWS")
    kernel.weight_gradient_kernel[_grid(problem)](
        flat, x, inputs.source, inputs.offsets, into[0], where, *problem.sizes(doubled=not transposed), inputs.topk,
        GATHERS=inputs.source is not None, TRANSPOSED=transposed, ADDS=bool(sinks), ALIGNMENT=alignment, **blocks,
    )  # fmt: skip
    return grads


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


def _blocks(inputs: Inputs, pairs: bool = False) -> dict[str, Any]:
    """Sizes of tiles and of programs.

    Tiles of gate and up `pairs` are half as wide: with 128 columns they spill on sm_90. So do all large tiles whose
    rows are not multiples of 16 bytes, as every element then has an address of its own.
    """
    x, widths = inputs.x, (inputs.width, inputs.shared_width)
    aligned = not any(each * x.element_size() % 16 for each in (x.shape[1], *widths))
    if _IS_INTERPRETED:
        # So small that small tensors have several.
        return {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 16, "BLOCK_INNER": 16, "WIDENS": x.dtype == torch.bfloat16}
    if aligned and x.dtype != torch.float32:
        blocks = {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_INNER": 64, "num_warps": 8, "num_stages": 3}
    else:
        blocks = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_INNER": 32, "num_warps": 8, "num_stages": 3}
    return {**blocks, "BLOCK_COLUMNS": blocks["BLOCK_COLUMNS"] // (2 if pairs else 1), "WIDENS": False}
