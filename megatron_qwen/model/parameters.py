"""Exact numbers of parameters, from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_qwen.model.config import QwenConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """How many parameters a model has.

    Attributes:
        total: all of them; tied embeddings count once.
        embedding: rows of the input embedding, and of the output layer where it is not tied.
        active: those one token meets: all but the experts that are not chosen.
    """

    total: int
    embedding: int
    active: int

    @property
    def non_embedding(self) -> int:
        """Parameters outside the input embedding and the output layer, as the technical report counts."""
        return self.total - self.embedding


def count_parameters(config: QwenConfig) -> ParameterCount:
    """Count the parameters of a model.

    Per layer: query, key and value projections with bias, output projection without, two norms; a dense MLP has
    three matrices, a MoE layer a router, its experts, the shared expert and the row of the shared expert's gate.
    """
    hidden, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
    attention = (hidden + 1) * (hidden + 2 * kv_size) + hidden * hidden
    norms = 2 * hidden
    dense_mlp = 3 * hidden * config.intermediate_size
    expert = 3 * hidden * config.moe_intermediate_size
    outside_experts = hidden * config.num_experts + 3 * hidden * config.shared_expert_intermediate_size + hidden
    num_moe = sum(config.moe_layers())
    num_dense = config.num_hidden_layers - num_moe
    embedding = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    common = embedding + config.num_hidden_layers * (attention + norms) + hidden + num_dense * dense_mlp
    return ParameterCount(
        total=common + num_moe * (outside_experts + config.num_experts * expert),
        embedding=embedding,
        active=common + num_moe * (outside_experts + config.num_experts_per_tok * expert),
    )
