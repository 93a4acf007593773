"""Routed and shared experts of a layer: y = sum_j w_j MLP_{e_j}(x) + sigmoid(x g) MLP_s(x).

MLP(x) = (silu(x W1g^T) * (x W1u^T)) W2^T, with W1 = [W1g; W1u] as Megatron-Core and Hugging Face store it. Source:
transformers, Qwen2MoeSparseMoeBlock. In torch: one GEMM per group and matrix, everything else on the rows of a group
while they are in the cache, and no Python per token. A row's weight multiplies the activation instead of the output:
it is narrower, and the weight's gradient is (dy W2) . h, for which no output has to be kept.

Shapes as in inputs.py; the outputs of W1 are `packed`, flat [R 2F], and `common`, flat [T 2Fs].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch.nn import functional

from ..moe_permute.reference import gather_sum
from ..products import add_product, product, product_over_rows
from .inputs import Gradients, Inputs, Sinks

# Numbers of a block of elementwise work: 256 KiB per operand in fp32.
BLOCK_NUMBERS = 65536


def forward(inputs: Inputs, keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, of the shape of x, and the outputs of W1: packed and common, empty unless `keep`."""
    x, weights, offsets, source, positions, fc1, fc2, shared = inputs
    # Apart, as allocators return large blocks to the system: [2048, 256] tokens took 37 ms of 274 in page faults.
    packed, common = (x.new_empty(size) for size in inputs.kept_sizes)
    routed = packed.view(weights.numel(), fc1[0].shape[0])
    tokens, row_weights = _rows(weights, source, positions)
    rows_y = x.new_empty(weights.numel(), x.shape[1])
    buffer = _buffer(x, tokens, offsets)
    for expert, rows in _groups(offsets):
        product(_take(x, tokens, rows, buffer), fc1[expert].t(), out=routed[rows])
        hidden = _activate(routed[rows], row_weights[rows])
        product(hidden, fc2[expert].t(), out=rows_y[rows])
    y = rows_y if positions is None else gather_sum(rows_y, positions)
    if shared:
        first = product(x, shared[0].t(), out=common.view(x.shape[0], shared[0].shape[0]))
        add_product(y, _activate(first, _gate(x, shared)), shared[1].t())
    return (y, packed, common) if keep else (y, x.new_empty(0), x.new_empty(0))


def backward(
    grad: torch.Tensor, inputs: Inputs, packed: torch.Tensor, common: torch.Tensor, sinks: Sinks = ()
) -> Gradients:
    """Return the gradients of x, weights, fc1, fc2 and shared.

    Args:
        grad: of y.
        inputs: those of `forward`.
        packed: of `forward`, or empty to compute it again.
        common: as packed.
        sinks: for each of fc1, fc2 and shared, in this order, what its gradient is added to, or None; where it is
            added, an uninitialised tensor is returned in its place.
    """
    x, weights, offsets, source, positions, fc1, fc2, shared = inputs
    routed = packed.view(weights.numel(), fc1[0].shape[0]) if packed.numel() else None
    tokens, row_weights = _rows(weights, source, positions)
    grad_rows = row_weights.new_empty(weights.numel())
    grad_x_rows = x.new_empty(weights.numel(), x.shape[1])
    grads = [torch.empty(0)] * (2 * len(fc1))
    buffers = _buffer(x, tokens, offsets), _buffer(x, tokens, offsets)
    sinks = sinks or [None] * (2 * len(fc1) + len(shared))
    for expert, rows in _groups(offsets):
        x_rows, grad_y = _take(x, tokens, rows, buffers[0]), _take(grad, tokens, rows, buffers[1])
        first = product(x_rows, fc1[expert].t()) if routed is None else routed[rows]
        hidden, grad_first, grad_rows[rows] = _backward_rows(product(grad_y, fc2[expert]), first, row_weights[rows])
        product(grad_first, fc1[expert], out=grad_x_rows[rows])
        for index, left, right in ((expert, grad_first, x_rows), (len(fc1) + expert, grad_y, hidden)):
            grads[index] = _weight_gradient((*fc1, *fc2)[index], left, right, sinks[index])
    grad_x = grad_x_rows if positions is None else gather_sum(grad_x_rows, positions)
    grad_weights = grad_rows if positions is None else grad_rows[positions]
    grads_shared = []
    if shared:
        first = common.view(x.shape[0], -1) if common.numel() else product(x, shared[0].t())
        grads_shared = _backward_shared(grad, x, first, shared, grad_x, sinks[2 * len(fc1) :])
    return grad_x, grad_weights, grads[: len(fc1)], grads[len(fc1) :], grads_shared


def _backward_shared(
    grad: torch.Tensor,
    x: torch.Tensor,
    first: torch.Tensor,
    shared: list[torch.Tensor],
    grad_x: torch.Tensor,
    sinks: Sinks,
) -> list[torch.Tensor]:
    """Return the gradients of the shared expert's matrices, and add what flows through it to grad_x [T, H]."""
    gate = _gate(x, shared)
    hidden, grad_first, grad_gate = _backward_rows(product(grad, shared[1]), first, gate)
    add_product(grad_x, grad_first, shared[0])
    operands = [(grad_first, x), (grad, hidden)]
    if gate is not None:
        # sigmoid' = s (1 - s)
        grad_logit = (grad_gate * gate * (1.0 - gate)).to(x.dtype).unsqueeze(-1)
        grad_x.addmm_(grad_logit, shared[2])
        operands.append((grad_logit, x))
    return [_weight_gradient(weight, *pair, sink) for weight, pair, sink in zip(shared, operands, sinks, strict=True)]


def _rows(
    weights: torch.Tensor, source: torch.Tensor | None, positions: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return token and weight of each row; None for tokens if every row is a row of x."""
    if source is None or positions is None:
        return None, weights
    return source.div(positions.shape[1], rounding_mode="floor"), weights.flatten().index_select(0, source)


def _groups(offsets: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each expert and its rows."""
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        yield expert, slice(begin, end)


def _buffer(x: torch.Tensor, tokens: torch.Tensor | None, offsets: torch.Tensor) -> torch.Tensor:
    """Room for the rows of the largest group, used again by each: it stays in the cache."""
    largest = 0 if tokens is None or len(offsets) < 2 else int(offsets.diff().max())
    return x.new_empty(largest, x.shape[1])


def _take(x: torch.Tensor, tokens: torch.Tensor | None, rows: slice, buffer: torch.Tensor) -> torch.Tensor:
    """Return the rows of x of a group."""
    if tokens is None:
        return x[rows]
    return torch.index_select(x, 0, tokens[rows], out=buffer[: rows.stop - rows.start])


def _activate(packed: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return silu(gate) * up [N, F] of packed [N, 2F], weighted; in fp32 (fp64 for fp64), rounded once."""
    hidden = packed.new_empty(packed.shape[0], packed.shape[1] // 2)
    for rows in _blocks(hidden):
        gate, up = _wide(packed[rows]).chunk(2, dim=-1)
        silu_gate = functional.silu(gate)
        if weights is not None:
            silu_gate.mul_(weights[rows].unsqueeze(-1))
        torch.mul(silu_gate, up, out=hidden[rows])
    return hidden


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _blocks(hidden: torch.Tensor) -> Iterator[slice]:
    """Yield blocks of rows whose elementwise steps stay in the cache: there are eight of them in backward."""
    step = max(1, BLOCK_NUMBERS // max(1, hidden.shape[1]))
    for begin in range(0, hidden.shape[0], step):
        yield slice(begin, min(begin + step, hidden.shape[0]))


def _gate(x: torch.Tensor, shared: list[torch.Tensor]) -> torch.Tensor | None:
    """Return sigmoid(x g) [T] in fp32 (fp64 for fp64), or None where the shared expert has no gate."""
    if len(shared) < 3:
        return None
    return torch.mv(x, shared[2][0]).to(torch.promote_types(x.dtype, torch.float32)).sigmoid_()


def _backward_rows(
    grad_hidden: torch.Tensor, packed: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted activation, and the gradients of packed and weights, from that of the weighted activation.

    In fp32 and fp64 grad_hidden is written over.
    """
    grad_packed = packed.new_empty(packed.shape)
    hidden, grad_weights = packed.new_empty(grad_hidden.shape), _wide(packed.new_empty(packed.shape[0]))
    for rows in _blocks(hidden):
        gate, up = _wide(packed[rows]).chunk(2, dim=-1)
        grad_gate, grad_up = grad_packed[rows].chunk(2, dim=-1)
        grad, silu_gate = _wide(grad_hidden[rows]), functional.silu(gate)
        activated = silu_gate * up
        torch.linalg.vecdot(grad, activated, out=grad_weights[rows])
        if weights is None:
            hidden[rows] = activated
        else:
            grad.mul_(weights[rows].unsqueeze(-1))
            torch.mul(activated, weights[rows].unsqueeze(-1), out=hidden[rows])
        torch.mul(grad, silu_gate, out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(up), gate))
    return hidden, grad_packed, grad_weights


def _weight_gradient(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, sink: torch.Tensor | None
) -> torch.Tensor:
    """Return left^T right; or add it to `sink` and return an uninitialised tensor."""
    grad = product_over_rows(left, right, sink)
    return grad if sink is None else torch.empty_like(weight)
