"""SwiGLU on the packed output of a gate-and-up projection: y = silu(gate) * up, silu(g) = g / (1 + exp(-g)).

Source: arXiv 2002.05202. In torch, in the fewest passes over memory.

Shapes: N tokens (any leading axes), F the MLP's width; packed is [N, 2F], gate first.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def forward(packed: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., F], contiguous, of packed [..., 2F]."""
    gate, up = packed.chunk(2, dim=-1)
    out = packed.new_empty(gate.shape)
    torch.ops.aten.silu.out(gate, out=out)
    return out.mul_(up)


def backward(grad: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Return the gradient of packed [..., 2F], contiguous, from that of the output [..., F]."""
    gate, up = packed.chunk(2, dim=-1)
    return swiglu_backward_(grad, gate, functional.silu(gate), up)


def swiglu_backward_(grad: torch.Tensor, gate: torch.Tensor, silu_gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the packed input [..., 2F] of silu(gate) * up, both halves written in place.

    With s = sigmoid(gate): d gate = grad up s (1 + gate (1 - s)), d up = grad silu(gate). Autograd's own formula
    concatenates the halves, at one more pass.

    Args:
        grad: of the output [..., F].
        gate: the first half of the packed input.
        silu_gate: silu(gate); overwritten.
        up: the second half.
    """
    width = gate.shape[-1]
    grad_packed = grad.new_empty(*grad.shape[:-1], 2 * width)
    grad_gate, grad_up = grad_packed[..., :width], grad_packed[..., width:]
    torch.mul(grad, silu_gate, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(torch.mul(grad, up, out=silu_gate), gate, grad_input=grad_gate)
    return grad_packed
