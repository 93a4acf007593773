"""MoE layer of the local backend: routing, routed and shared experts in one operation where all experts are here.

That is so at expert-parallel size 1 and expert-tensor-parallel size 1: no dispatcher, and no row of [T k, H] is kept.
Elsewhere Megatron-Core's forward stays: its dispatchers carry the tokens, `LocalExperts` computes them, and with
`moe_shared_expert_overlap` the shared experts run while they travel.

Shapes: S tokens of a sequence (this rank's under sequence parallelism), B sequences, T = S B tokens, H hidden size,
k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_qwen import ops
from megatron_qwen.model.experts import LocalExperts, parameter_of
from megatron_qwen.model.router import QwenRouter, say_once


class QwenMoELayer(MoELayer):  # type: ignore[misc]  # megatron-core is untyped
    """Megatron-Core's MoE layer; parameters, checkpoints and losses are the same.

    With tensor parallelism the shared experts, whose matrices are split, stay Megatron's module beside the operation.
    Recompute of "moe" drops the outputs of the first matrices and computes them again in backward; routing is kept.

    Attributes:
        in_one_operation: whether forward goes through `ops.moe_mlp`. False: through the modules, as Megatron does, so
            that hooks on them see what comes and goes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Build Megatron's layer; arguments are its own."""
        super().__init__(*args, **kwargs)
        self.in_one_operation = self.ep_group.size() == 1 and self.experts.tp_group.size() == 1
        if self.in_one_operation:
            obstacles = self._obstacles()
            self.in_one_operation = not obstacles
            if obstacles:
                say_once(f"the MoE layer goes Megatron-Core's way, not through ops.moe_mlp: {', '.join(obstacles)}")

    def _obstacles(self) -> list[str]:
        """Return what the configuration asks for that only Megatron's forward does."""
        config = self.config
        splits_shared = self.attn_tp_group.size() > 1
        found = {
            "its router": not isinstance(self.router, QwenRouter) or bool(self.router.beyond),
            "its experts": not isinstance(self.experts, LocalExperts) or not self.experts.is_plain(),
            "tensor without sequence parallelism": splits_shared and not config.sequence_parallel,
            "overlapped shared experts that are split": splits_shared and self.shared_expert_overlap,
            "recompute of a layer whose shared experts are split": splits_shared and self.moe_layer_recompute,
            "CUDA graphs": config.cuda_graph_impl != "none",
            "offloading of activations": config.fine_grained_activation_offloading,
            "latent experts": bool(config.moe_latent_size),
            "rows padded for quantization": config.moe_router_padding_for_quantization,
        }
        return [name for name, is_there in found.items() if is_there]

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the layer's output [S, B, H], and None for the bias that experts lack.

        Args:
            hidden_states: [S, B, H].
            intermediate_tensors: of Megatron's schedules that run the layer in parts; it then returns parts.
            padding_mask: [B, S], True for padding, or None.
            kwargs: further arguments of Megatron's forward.
        """
        if self.in_one_operation and padding_mask is not None:
            say_once("the MoE layer goes Megatron-Core's way, not through ops.moe_mlp: a padding mask")
        if not self.in_one_operation or intermediate_tensors is not None or padding_mask is not None or kwargs:
            return super().forward(hidden_states, intermediate_tensors, padding_mask, **kwargs)
        weights, experts = self.router.choose(hidden_states)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routed = self.experts.local_experts
        shared = self._shared_parameters()
        y = ops.moe_mlp(
            x,
            weights.to(torch.promote_types(x.dtype, torch.float32)),
            ops.expert_order(experts, len(routed)),
            [parameter_of(expert.linear_fc1) for expert in routed],
            [parameter_of(expert.linear_fc2) for expert in routed],
            shared=shared,
            recompute=self.moe_layer_recompute,
        ).view(hidden_states.shape)
        if shared is None and self.use_shared_expert:
            y = y + self.shared_experts_compute(hidden_states)
        return y, None

    def _shared_parameters(self) -> ops.SharedExpert | None:
        """Return what of the shared experts joins the operation; None if they are split or recomputed on their own."""
        module = self.shared_experts
        recomputed_alone = self.shared_experts_recompute and not self.moe_layer_recompute
        if module is None or self.attn_tp_group.size() > 1 or recomputed_alone:
            return None
        gate = parameter_of(module, "gate_weight") if module.use_shared_expert_gate else None
        return ops.SharedExpert(parameter_of(module.linear_fc1), parameter_of(module.linear_fc2), gate)
