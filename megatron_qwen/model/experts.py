"""Routed experts of the local backend: all of a rank's in one operation, `ops.grouped_mlp`.

Parameters, names and checkpoints are those of Megatron-Core's SequentialMLP; only the computation differs.

Shapes: R rows of this rank, sorted by expert (a token is there once per expert that it chose), H hidden size.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor
from torch.nn import functional

from megatron_qwen import ops
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.swiglu import SwiGLU, is_plain_swiglu


class LocalExperts(SequentialMLP):  # type: ignore[misc]  # megatron-core is untyped
    """SequentialMLP without an autograd graph, an activation and a concatenation per expert.

    On a CPU, a layer of 16 experts (512 tokens, top 4, H 512, F 352, fp32, 2 threads) spends nearly a tenth of a
    training step in those; see docs/benchmarks.md.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the experts' outputs weighted by the router's probabilities.

        Args:
            permuted_local_hidden_states: [R, H], sorted by expert.
            tokens_per_expert: [experts of this rank], integers that sum to R; zero is fine.
            permuted_probs: [R], the router's weight of each row.

        Returns:
            [R, H] in the dtype of the input, and None for the bias that Qwen's experts lack.
        """
        x = permuted_local_hidden_states
        if not self.is_plain():
            result: tuple[Tensor, Tensor | None] = super().forward(x, tokens_per_expert, permuted_probs)
            return result
        offsets = functional.pad(tokens_per_expert.to(x.device, torch.int64).cumsum(0), (1, 0))
        output = ops.grouped_mlp(
            x.contiguous(),
            permuted_probs.to(torch.promote_types(x.dtype, torch.float32)),
            offsets,
            [parameter_of(expert.linear_fc1) for expert in self.local_experts],
            [parameter_of(expert.linear_fc2) for expert in self.local_experts],
        )
        return output, None

    def is_plain(self) -> bool:
        """Whether nothing is asked for that only Megatron's own forward does."""
        config = self.config
        activation = self.local_experts[0].activation_func
        is_known = isinstance(activation, SwiGLU) or activation is functional.silu
        asks_for_more = config.add_bias_linear or config.moe_apply_probs_on_input or config.fp8 or config.fp4
        return is_known and is_plain_swiglu(config) and not asks_for_more


def parameter_of(module: torch.nn.Module, name: str = "weight") -> Tensor:
    """Return a parameter of a module whose forward is not called, after the module's forward pre-hooks.

    In them Megatron's DDP waits for the parameters that it gathers while the layers before are computed
    (overlap_param_gather).

    Raises:
        ConfigError: a hook returns inputs for the module, which has none here.
    """
    for key, hook in module._forward_pre_hooks.items():
        result = hook(module, (), {}) if key in module._forward_pre_hooks_with_kwargs else hook(module, ())
        if result is not None:
            raise ConfigError(
                f"local backend: a forward pre-hook of {type(module).__name__} returns inputs, but experts are "
                "computed in one operation and their modules get none; remove the hook, or put it on the MoE layer"
            )
    parameter: Tensor = getattr(module, name)
    return parameter
