"""SwiGLU on the packed output of `linear_fc1`, in the fewest passes over memory.

Shapes: N tokens (any leading axes), F the MLP's width; packed is [N, 2F], gate first.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_qwen.errors import ConfigError


class SwiGLU(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """silu(gate) * up, as the activation module that Megatron's MLPs take from a layer spec."""

    def __init__(self, config: TransformerConfig) -> None:
        """Check that the model's activation is this one.

        Raises:
            ConfigError: another activation, a clamp, or an offset.
        """
        super().__init__(config=config)
        is_plain = config.activation_func_clamp_value is None and config.glu_linear_offset == 0.0
        if config.activation_func is not functional.silu or not config.gated_linear_unit or not is_plain:
            raise ConfigError(
                f"local backend: got activation_func {config.activation_func}, gated_linear_unit "
                f"{config.gated_linear_unit}, activation_func_clamp_value {config.activation_func_clamp_value}, "
                f"glu_linear_offset {config.glu_linear_offset}; expected plain SwiGLU (silu, gated)"
            )

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up [..., F] of packed [..., 2F]; any floating dtype, which is the result's."""
        return _SwiGLU.apply(packed)  # type: ignore[no-any-return, no-untyped-call]


class _SwiGLU(torch.autograd.Function):
    """Writes both halves of the gradient in place; autograd's own concatenates them, at one more pass."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(packed)
        gate, up = packed.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> torch.Tensor:
        (packed,) = ctx.saved_tensors
        gate, up = packed.chunk(2, dim=-1)
        return swiglu_backward(grad_outputs[0], gate, functional.silu(gate), up)


def swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, silu_gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the packed input [..., 2F] of silu(gate) * up.

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
