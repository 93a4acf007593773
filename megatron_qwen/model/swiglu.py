"""SwiGLU on the packed output of `linear_fc1`, as the module that Megatron's MLPs take."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError


def is_plain_swiglu(config: TransformerConfig) -> bool:
    """Whether the configuration's activation is silu(gate) * up, without a clamp or an offset."""
    return (
        config.activation_func is functional.silu
        and config.gated_linear_unit
        and config.activation_func_clamp_value is None
        and config.glu_linear_offset == 0.0
    )


class SwiGLU(MegatronModule):  # type: ignore[misc]  # megatron-core is untyped
    """silu(gate) * up, as the activation module that Megatron's MLPs take from a layer spec."""

    def __init__(self, config: TransformerConfig) -> None:
        """Check that the model's activation is this one.

        Raises:
            ConfigError: another activation, a clamp, or an offset.
        """
        super().__init__(config=config)
        if not is_plain_swiglu(config):
            raise ConfigError(
                f"local backend: got activation_func {config.activation_func}, gated_linear_unit "
                f"{config.gated_linear_unit}, activation_func_clamp_value {config.activation_func_clamp_value}, "
                f"glu_linear_offset {config.glu_linear_offset}; expected plain SwiGLU (silu, gated)"
            )

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) * up [..., F] of packed [..., 2F]; any floating dtype, which is the result's."""
        return ops.swiglu(packed)
