"""A transformer layer whose residual add behind attention and the norm in front of the MLP are one operation.

Megatron-Core's layer does the two in separate modules: five tensors of the hidden size are moved, here four, and in
backward one less.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_qwen import compat
from megatron_qwen.model.norm import RMSNorm

WithBias = tuple[torch.Tensor, torch.Tensor | None]


class ResidualNormLayer(TransformerLayer):  # type: ignore[misc]  # megatron-core is untyped
    """Megatron-Core's layer; parameters and results are the same.

    Where dropout, a bias, fp32 residuals or recompute of the norm stand between the two, they stay apart.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *args: Any,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        """Build Megatron's layer; arguments are its own."""
        submodules = compat.with_process_groups(submodules, pg_collection)
        super().__init__(config, submodules, *args, pg_collection=pg_collection, **kwargs)
        if isinstance(self.pre_mlp_layernorm, RMSNorm) and not (
            self.hidden_dropout or self.recompute_pre_mlp_layernorm or self.config.fp32_residual_connection
        ):
            plain: Any = self.self_attn_bda  # type: ignore[has-type]  # megatron-core is untyped
            self.self_attn_bda = _AddBeforeNorm(self.pre_mlp_layernorm, plain)

    def _forward_attention(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.self_attn_bda, _AddBeforeNorm):
            # Megatron enables gradients for the add, whatever the mode around it; a norm would then keep its input.
            self.self_attn_bda.wants_gradients = torch.is_grad_enabled()
        return super()._forward_attention(*args, **kwargs)


class _AddBeforeNorm:
    """In the place of Megatron's bias-dropout-add behind attention."""

    def __init__(self, norm: RMSNorm, otherwise: Any) -> None:
        self._norm = norm
        self._otherwise = otherwise
        self.wants_gradients = True

    def __call__(self, training: bool, fused: bool) -> Any:
        plain = self._otherwise(training, fused)

        def add(output_with_bias: WithBias, residual: torch.Tensor, dropout: float) -> torch.Tensor:
            output, bias = output_with_bias
            if bias is not None or dropout:
                total: torch.Tensor = plain(output_with_bias, residual, dropout)
                return total
            with torch.set_grad_enabled(self.wants_gradients):
                return self._norm.add(output, residual)

        return add
