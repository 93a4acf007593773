"""The grouped MLP by the CUDA kernels of the extension (sm_90a: wgmma, TMA); the same functions as in launch.py.

Forward: a map of the rows, up (gather, both halves of W1, SwiGLU), down (W2, the rows' weights), combine. Backward:
down and SwiGLU, up, combine, and the two gradients of matrices. Rows in expert order are those of all experts, and
behind them the shared expert's, one per token; a flat buffer holds [R, F] and then [T, Fs].

Shapes as in inputs.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ... import _C
from ..cuda_launch import address, dtype_name, launching_on
from .inputs import Gradients, Inputs, Problem, Sinks


@dataclass(frozen=True, kw_only=True)
class _Problem(Problem):
    """What all launches of a call share."""

    stream: int

    @property
    def size(self) -> int:
        """H."""
        return self.x.shape[1]

    def flat(self, factor: int) -> torch.Tensor:
        """Room for [R, factor F] and [T, factor Fs]."""
        return self.x.new_empty(factor * self.numbers(self.inputs.width, self.inputs.shared_width))

    @functools.cached_property
    def gates(self) -> torch.Tensor | None:
        """sigmoid(x g) [T] fp32; None where the shared expert has no gate."""
        if self.gate is None:
            return None
        gates = self.x.new_empty(self.x.shape[0], dtype=torch.float32)
        _C.moe_gate(
            x=self.x.data_ptr(),
            vector=self.gate.data_ptr(),
            out=gates.data_ptr(),
            tokens=self.x.shape[0],
            size=self.size,
            dtype=dtype_name(self.x),
            stream=self.stream,
        )
        return gates

    @functools.cached_property
    def row_map(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of x [R + T] int32 and weight [R + T] fp32 of each row."""
        gates, rows, given = self.gates, self.routed + self.shared_tokens, self.inputs
        tokens = self.x.new_empty(rows, dtype=torch.int32)
        row_weights = self.x.new_empty(rows, dtype=torch.float32)
        _C.moe_row_map(
            source=address(given.source),
            weights=given.weights.data_ptr(),
            gates=address(gates),
            tokens=tokens.data_ptr(),
            row_weights=row_weights.data_ptr(),
            routed=self.routed,
            shared_tokens=self.shared_tokens,
            topk=given.topk,
            stream=self.stream,
        )
        return tokens, row_weights

    def groups(self) -> tuple[int, int, int, int, int, int, int, int, int]:
        """Arguments of every launch: see _C.pyi."""
        tokens, given = self.row_map[0], self.inputs
        return (
            given.offsets.data_ptr(),
            tokens.data_ptr(),
            len(given.fc1),
            self.routed,
            self.shared_tokens,
            self.x.shape[0],
            self.size,
            given.width,
            given.shared_width,
        )


def forward(inputs: Inputs, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y and the outputs of W1, as `reference.forward`."""
    x = inputs.x
    if not x.numel():
        return x.new_empty(x.shape), x.new_empty(0), x.new_empty(0)
    with launching_on(x) as stream:
        problem = _Problem(inputs=inputs, stream=stream)
        hidden = problem.flat(1)
        packed = problem.flat(2) if keep else None
        _up(problem, packed, hidden)
        y = x.new_empty(problem.routed + problem.shared_tokens, problem.size)
        _down(problem, hidden, problem.fc2, y, weigh=True)
        out = _combine(problem, y, None)
    if packed is None:
        return out, x.new_empty(0), x.new_empty(0)
    kept = inputs.kept_sizes[0]
    return out, packed[:kept], packed[kept:]


def backward(
    grad: torch.Tensor, inputs: Inputs, packed: torch.Tensor, common: torch.Tensor, sinks: Sinks = ()
) -> Gradients:
    """Return the gradients of x, weights, fc1, fc2 and shared; arguments as `reference.backward`."""
    x, shared = inputs.x, inputs.shared
    if not x.numel():
        none = [[torch.zeros_like(each) for each in group] for group in (inputs.fc1, inputs.fc2, shared)]
        return x.new_empty(x.shape), torch.zeros_like(inputs.weights), none[0], none[1], none[2]
    with launching_on(x) as stream:
        problem = _Problem(inputs=inputs, stream=stream)
        grad_packed, hidden = problem.flat(2), problem.flat(1)
        both = _packed_of(problem, packed, common)
        grad_weights, grad_gates = _activation_backward(problem, grad, both, grad_packed, hidden)
        grad_logits = None
        if problem.gates is not None:
            grad_logits = grad_gates * problem.gates * (1.0 - problem.gates)
        grad_rows = x.new_empty(problem.routed + problem.shared_tokens, problem.size)
        _down(problem, grad_packed, problem.fc1, grad_rows, weigh=False)
        grad_x = _combine(problem, grad_rows, grad_logits)
        into = problem.sort_sinks(sinks)
        grads1 = _matrix_gradients(problem, grad_packed, x, problem.fc1, into[0], transposed=False)
        grads2 = _matrix_gradients(problem, hidden, grad, problem.fc2, into[1], transposed=True)
        grads_shared = [grads1.pop(), grads2.pop()] if shared else []
        if grad_logits is not None:
            grads_shared.append(_gate_gradient(problem, grad_logits, sinks[-1] if sinks else None))
    return grad_x, grad_weights, grads1, grads2, grads_shared


def _packed_of(problem: _Problem, packed: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
    """Return the outputs of W1: what forward kept, or computed again."""
    if not packed.numel():
        again = problem.flat(2)
        _up(problem, again, None)
        return again
    if packed.data_ptr() + packed.nbytes == common.data_ptr() and packed.untyped_storage().nbytes() >= (
        packed.storage_offset() * packed.element_size() + packed.nbytes + common.nbytes
    ):
        return packed.as_strided((packed.numel() + common.numel(),), (1,))
    # Compiled code may have moved them apart.
    return torch.cat([packed, common]) if common.numel() else packed


def _pointers(matrices: Sequence[torch.Tensor]) -> list[int]:
    return [each.data_ptr() for each in matrices]


def _up(problem: _Problem, packed: torch.Tensor | None, hidden: torch.Tensor | None) -> None:
    """Fill packed with x W1^T and hidden with silu(gate) * up, each if it is given."""
    _C.grouped_up(
        groups=problem.groups(),
        x=problem.x.data_ptr(),
        fc1=_pointers(problem.fc1),
        packed=address(packed),
        hidden=address(hidden),
        dtype=dtype_name(problem.x),
        stream=problem.stream,
    )


def _down(problem: _Problem, a: torch.Tensor, matrices: list[torch.Tensor], out: torch.Tensor, weigh: bool) -> None:
    """Fill out [R + T, H] with a W2^T, rows weighted, of W2 [H, F]; or unless `weigh` with a W1 of W1 [2F, H]."""
    _C.grouped_down(
        groups=problem.groups(),
        a=a.data_ptr(),
        matrices=_pointers(matrices),
        row_weights=problem.row_map[1].data_ptr() if weigh else 0,
        out=out.data_ptr(),
        factor=1 if weigh else 2,
        transposed=weigh,
        dtype=dtype_name(a),
        stream=problem.stream,
    )


def _activation_backward(
    problem: _Problem, grad: torch.Tensor, packed: torch.Tensor, grad_packed: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill grad_packed and the weighted hidden; return the gradients of weights, and of the shared expert's [T]."""
    columns, shared_columns = (
        _C.activation_backward_columns(width=width) for width in (problem.inputs.width, problem.inputs.shared_width)
    )
    sizes = [columns * problem.routed, shared_columns * problem.shared_tokens]
    partial = problem.x.new_empty(sum(sizes), dtype=torch.float32)
    _C.grouped_activation_backward(
        groups=problem.groups(),
        grad=grad.data_ptr(),
        fc2=_pointers(problem.fc2),
        row_weights=problem.row_map[1].data_ptr(),
        slots=address(problem.inputs.source),
        packed=packed.data_ptr(),
        grad_packed=grad_packed.data_ptr(),
        hidden=hidden.data_ptr(),
        partial=partial.data_ptr(),
        dtype=dtype_name(grad),
        stream=problem.stream,
    )
    routed, shared = torch.split(partial, sizes)
    grad_weights = routed.view(columns, problem.routed).sum(0).view(problem.inputs.weights.shape)
    return grad_weights, shared.view(shared_columns, problem.shared_tokens).sum(0)


def _combine(problem: _Problem, per_row: torch.Tensor, grad_logits: torch.Tensor | None) -> torch.Tensor:
    """Return [T, H]: each token's rows of per_row [R + T, H], and what flows through the gate; [R, H] if sorted."""
    positions = problem.inputs.positions
    if positions is None:
        return per_row
    out = problem.x.new_empty(problem.x.shape)
    _C.moe_combine(
        rows=per_row.data_ptr(),
        positions=positions.data_ptr(),
        shared=per_row[problem.routed :].data_ptr() if problem.shared_tokens else 0,
        scale=address(grad_logits),
        vector=address(problem.gate) if grad_logits is not None else 0,
        out=out.data_ptr(),
        tokens=out.shape[0],
        size=problem.size,
        topk=positions.shape[1],
        dtype=dtype_name(out),
        stream=problem.stream,
    )
    return out


def _matrix_gradients(
    problem: _Problem,
    flat: torch.Tensor,
    x: torch.Tensor,
    matrices: list[torch.Tensor],
    sinks: list[torch.Tensor],
    transposed: bool,
) -> list[torch.Tensor]:
    """Return flat^T x of each group, of W1; or x^T flat if `transposed`, of W2; or add it to `sinks`."""
    grads = [torch.empty_like(each) for each in matrices]
    into = sinks or grads
    _C.grouped_weight_gradient(
        groups=problem.groups(),
        flat=flat.data_ptr(),
        x=x.data_ptr(),
        out=_pointers(into),
        factor=1 if transposed else 2,
        transposed=transposed,
        adds=bool(sinks),
        out_dtype=dtype_name(into[0]),
        dtype=dtype_name(x),
        stream=problem.stream,
    )
    return grads


def _gate_gradient(problem: _Problem, grad_logits: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Return the sum over tokens of grad_logits times x [1, H], in a fixed order; added to `sink` if there is one."""
    assert problem.gate is not None
    grad, x = torch.empty_like(problem.gate), problem.x
    programs = _C.moe_gate_gradient_programs(tokens=x.shape[0], size=problem.size)
    partial = x.new_empty(programs, problem.size, dtype=torch.float32)
    _C.moe_gate_gradient(
        scale=grad_logits.data_ptr(),
        x=x.data_ptr(),
        partial=partial.data_ptr(),
        tokens=x.shape[0],
        size=problem.size,
        programs=programs,
        dtype=dtype_name(x),
        stream=problem.stream,
    )
    _C.column_sum(
        partial=partial.data_ptr(),
        out=grad.data_ptr(),
        rows=programs,
        columns=problem.size,
        dtype=dtype_name(grad),
        stream=problem.stream,
    )
    if sink is not None:
        sink.add_(grad)
    return grad
