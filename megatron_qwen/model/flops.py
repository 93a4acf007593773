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
    return sum(train_flops_by_product(config, seq_length, causal=causal).values())


def train_flops_by_product(config: QwenConfig, seq_length: int, *, causal: bool) -> dict[str, float]:
    """Return what `train_flops_per_token` counts, by kind of matrix product over all layers; kinds it has none of lack.

    Args are those of `train_flops_per_token`.
    """
    keys = (seq_length + 1) / 2 if causal else float(seq_length)
    attention = 12.0 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * keys
    weights = {kind: 6.0 * count for kind, count in active_matrix_parameters(config).items() if count}
    return {**weights, "attention": attention}


def active_matrix_parameters(config: QwenConfig) -> dict[str, int]:
    """Return the weights that one token is multiplied with: no biases, norms or embedding, chosen experts only."""
    hidden = config.hidden_size
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    num_moe = sum(config.moe_layers())
    num_dense = config.num_hidden_layers - num_moe
    routed = 3 * hidden * config.moe_intermediate_size * config.num_experts_per_tok
    shared = 3 * hidden * config.shared_expert_intermediate_size + hidden
    return {
        "qkv GEMM": config.num_hidden_layers * hidden * (heads + 2 * kv_heads),
        "proj GEMM": config.num_hidden_layers * heads * hidden,
        "fc1 GEMM": num_dense * 2 * hidden * config.intermediate_size,
        "fc2 GEMM": num_dense * hidden * config.intermediate_size,
        "router": num_moe * hidden * config.num_experts,
        "experts": num_moe * routed,
        "shared expert": num_moe * shared,
        "output GEMM": hidden * config.vocab_size,
    }
