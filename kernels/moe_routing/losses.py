"""Losses of a router, from what `moe_routing` sums over tokens: a few operations on [E] numbers.

To balance over a larger set of tokens, sum `counts` and the number of tokens over it first (several layers, ranks).

Shapes: E experts, k experts per token.
"""

from __future__ import annotations

import torch


def huggingface_balance_loss(
    counts: torch.Tensor, probability_sums: torch.Tensor, num_tokens: int | torch.Tensor
) -> torch.Tensor:
    """Return E sum_e f_e P_e with f = counts / tokens (sums to k) and P = probability_sums / tokens; balanced: k.

    Source: transformers, load_balancing_loss_func, which sums both over all layers first and counts a token once per
    layer. Multiply by `router_aux_loss_coef`.

    Args:
        counts: [E], how many tokens chose each expert.
        probability_sums: [E], the sum over tokens of each expert's probability; the gradient flows through it.
        num_tokens: tokens behind the sums; the loss of none is 0.
    """
    tokens = num_tokens.clamp(min=1) if isinstance(num_tokens, torch.Tensor) else max(num_tokens, 1)
    return counts.shape[0] * (counts / tokens * (probability_sums / tokens)).sum()


def megatron_balance_loss(
    counts: torch.Tensor, probability_sums: torch.Tensor, num_tokens: int | torch.Tensor, *, topk: int
) -> torch.Tensor:
    """Return `huggingface_balance_loss` / k, whose balanced value is 1.

    Source: Megatron-Core, switch_load_balancing_loss_func, which applies it per layer: the same total needs a
    coefficient of k / layers times Hugging Face's.
    """
    return huggingface_balance_loss(counts, probability_sums, num_tokens) / topk


def z_loss(z_sum: torch.Tensor, num_tokens: int | torch.Tensor) -> torch.Tensor:
    """Return mean(logsumexp(logits)^2) over tokens. Source: arXiv 2202.08906; Megatron-Core, z_loss_func.

    Args:
        z_sum: scalar, the sum over tokens of logsumexp(logits)^2.
        num_tokens: tokens behind the sum; the loss of none is 0.
    """
    tokens = num_tokens.clamp(min=1) if isinstance(num_tokens, torch.Tensor) else max(num_tokens, 1)
    return z_sum / tokens
