"""Megatron-Core's router with softmax, top-k and what the balance losses sum computed by `ops.moe_routing`.

Parameters, names, losses, coefficients and Megatron's table of losses are its own.

Shapes: S tokens of a sequence (this rank's under sequence parallelism), B sequences, T = S B tokens, E experts,
k experts per token, H hidden size.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_qwen import compat, ops

logger = logging.getLogger(__name__)

BALANCE_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss")


def beyond_the_operation(config: TransformerConfig) -> list[str]:
    """Return the options of a configuration, as "name=value", for which routing is left to Megatron-Core."""
    fields: dict[str, Any] = {
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_topk_scaling_factor": None,
        "moe_router_fusion": False,
        "moe_enable_routing_replay": False,
        "moe_expert_capacity_factor": None,
    }
    found = [f"{name}={getattr(config, name)}" for name, plain in fields.items() if getattr(config, name) != plain]
    balancing = config.moe_router_load_balancing_type
    kinds = [balancing] if isinstance(balancing, str) else balancing
    if not {*kinds} <= {"none", *BALANCE_LOSSES}:
        found.append(f"moe_router_load_balancing_type={balancing}")
    return found


@functools.cache
def say_once(text: str) -> None:
    """Log a warning the first time it is given."""
    logger.warning(text)


class QwenRouter(TopKRouter):  # type: ignore[misc]  # megatron-core is untyped
    """TopKRouter whose choices are those of `ops.moe_routing`: equal logits go to the expert of the lower index.

    Where the configuration asks for more than the operation does (`beyond_the_operation`), and for batches with a
    padding mask, routing is Megatron's own; one line in the log says so.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """Build Megatron's router; arguments are its own."""
        super().__init__(config, *args, **kwargs)
        self.beyond = beyond_the_operation(config)
        if self.beyond:
            say_once(f"routing is Megatron-Core's own, not ops.moe_routing: {', '.join(self.beyond)}")
        self._is_choosing = False

    def choose(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [T, k] and experts [T, k] int64 of hidden_states [S, B, H], balance losses attached.

        Weights are in the router's dtype (`moe_router_dtype`, else that of hidden_states).
        """
        self._is_choosing = True
        try:
            weights, experts = self(hidden_states)
        finally:
            self._is_choosing = False
        return weights, experts

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weights and choices as dispatchers take them: [T, E], 0 where not chosen, and [T, E] bool.

        Called by Megatron's forward, behind jitter, gating and forced balancing; within `choose`, returns what that
        does.

        Args:
            logits: [S, B, E].
            padding_mask: [S, B], True for padding, or None.
        """
        if padding_mask is not None:
            say_once("routing of batches with a padding mask is Megatron-Core's own, not ops.moe_routing")
        if self.beyond or padding_mask is not None:
            dense: tuple[Tensor, Tensor] = super().routing(logits, padding_mask=padding_mask)
            return dense
        length, batch = logits.shape[:2]
        logits = self.apply_z_loss(logits.reshape(-1, logits.shape[-1]))
        routing = ops.moe_routing(logits, self.topk, renormalize=not self.config.moe_router_pre_softmax)
        weights = routing.weights
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            weights = self._attach_balance_losses(weights, logits, routing, length, batch)
        weights = weights.to(logits.dtype)
        if self._is_choosing:
            return weights, routing.experts
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, routing.experts, True)
        return torch.zeros_like(logits).scatter(1, routing.experts, weights), chosen

    def _attach_balance_losses(
        self, weights: Tensor, logits: Tensor, routing: ops.Routing, length: int, batch: int
    ) -> Tensor:
        """Return the weights with the losses behind them that the configuration asks for; see BALANCE_LOSSES."""
        weights = self._attach_balance_loss(weights, routing, "aux_loss", "load_balancing_loss", self.tp_cp_group)
        if self.get_aux_loss_coeff("seq_aux_loss"):
            # Per sequence: sums over all tokens are not enough.
            scores = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, routing.experts, True)
            weights = self._apply_seq_aux_loss(weights, scores, chosen, length, batch)
        if self.get_aux_loss_coeff("global_aux_loss"):
            weights = self._attach_balance_loss(
                weights, routing, "global_aux_loss", "global_load_balancing_loss", self.tp_dp_cp_group
            )
        return weights

    def _attach_balance_loss(
        self, weights: Tensor, routing: ops.Routing, kind: str, label: str, group: torch.distributed.ProcessGroup
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff(kind)
        if not coefficient:
            return weights
        counts = reduce_from_tensor_model_parallel_region(routing.counts, group)
        is_global = kind == "global_aux_loss"
        if is_global:
            # Of the batch so far: a running mean over its micro-batches.
            self.global_tokens_per_expert += counts
            self.ga_steps += 1
            counts = self.global_tokens_per_expert / self.ga_steps
        tokens = weights.shape[0]
        loss = ops.megatron_balance_loss(counts, routing.probability_sums, tokens * group.size(), topk=self.topk)
        options = compat.of_data_parallel_ranks() if is_global else {}
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            weights, coefficient, loss * coefficient, label, group, valid_token_count=tokens, **options
        )
        return attached
