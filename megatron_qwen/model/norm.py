"""RMSNorm without Transformer Engine or apex, with sequence parallelism.

Megatron-Core's own fallback, `WrappedTorchNorm`, refuses sequence parallelism, leaves its weight in
fp32 and is not marked for the gradient sum over tensor-parallel ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    The parameter is named `weight`, as in every norm Megatron-Core takes.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        """Create the weight (ones) in the model's dtype.

        Args:
            config: gives dtype and whether activations are sharded along the sequence.
            hidden_size: size of the last dimension.
            eps: added to the mean square.

        Raises:
            ConfigError: another normalisation, or zero-centred weights.
        """
        super().__init__()
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ConfigError(
                f"local backend: got normalization {config.normalization!r}, layernorm_zero_centered_gamma "
                f"{config.layernorm_zero_centered_gamma}; expected 'RMSNorm' and False"
            )
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence, so gradients are partial sums: Megatron adds up those marked so.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        self._ready: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [..., H]; any floating dtype, computed in fp32 (fp64 for fp64) and rounded once."""
        ready, self._ready = self._ready, None
        if ready is not None and ready[0] is x:
            return ready[1]
        return ops.rms_norm(x, self.weight, eps=self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return x + residual, both [..., H]; the call that follows with this very tensor has its norm already."""
        normalised, total = ops.add_rms_norm(x, residual, self.weight, eps=self.eps)
        self._ready = total, normalised
        return total
