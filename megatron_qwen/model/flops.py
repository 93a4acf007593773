"""Floating-point operations of training, by a stated convention."""

from __future__ import annotations

from megatron_qwen.model.config import QwenConfig


def train_flops_per_token(config: QwenConfig, seq_length: int, *, causal: bool) -> float:
    """Return the floating-point operations of forward and backward per token of one sequence.

    Convention ("model FLOPs", as in the PaLM paper's appendix B, arXiv 2204.02311):

    * a multiplication and an addition count as two; backward is twice forward, so 6 per weight and token;
    * counted are the matrix products of the projections, the MLPs, the router, the shared expert and its
      gate, and the output layer; an expert counts for the tokens it serves, so `num_experts_per_tok`
      experts per token; embedding look-up, norms, RoPE, softmax and activations are not counted;
    * attention adds 12 * heads * head_dim * t per layer, t being the keys a token meets: `seq_length`,
      or with `causal` their mean over the positions, (seq_length + 1) / 2;
    * recomputed activations are not counted.

    Megatron-LM before 0.12 counted attention without the causal half: say which one a figure is.

    Args:
        config: the model.
        seq_length: tokens per sequence.
        causal: count only the keys that causal attention reads.
    """
    keys = (seq_length + 1) / 2 if causal else float(seq_length)
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    return 6.0 * active_matrix_parameters(config) + attention


def active_matrix_parameters(config: QwenConfig) -> int:
    """Return the weights that one token is multiplied with: no biases, norms or embedding, chosen experts only."""
    hidden = config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    attention = hidden * (heads + 2 * kv_heads) + heads * hidden
    dense = 3 * hidden * config.intermediate_size
    routed = 3 * hidden * config.moe_intermediate_size * config.num_experts_per_tok
    shared = 3 * hidden * config.shared_expert_intermediate_size + hidden
    moe = hidden * config.num_experts + routed + shared
    num_moe = sum(config.moe_layers())
    layers = config.num_hidden_layers * attention + num_moe * moe + (config.num_hidden_layers - num_moe) * dense
    return layers + hidden * config.vocab_size
