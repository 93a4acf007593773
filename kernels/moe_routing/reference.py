"""Routing of tokens to experts: softmax over all experts, the k likeliest, and what losses need of the rest.

p = softmax(l) in fp32 (fp64 for fp64). The k experts with the largest logits are chosen, equal logits by the lower
index, NaN before everything. They are compared by logits, not by p: it is the same order, but does not depend on how an
exponential rounds, so every backend chooses alike. (torch.topk leaves the order of equal values open.)

Weights: w_j = p[e_j], or p[e_j] / sum_i p[e_i] if renormalised (`norm_topk_prob` of Hugging Face; Megatron-Core without
`moe_router_pre_softmax`). Source of the block: transformers, Qwen2MoeTopKRouter.

Shapes: T tokens, E experts, k experts per token.
"""

from __future__ import annotations

import torch

Forward = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def forward(logits: torch.Tensor, topk: int, renormalize: bool) -> Forward:
    """Return weights and experts [T, k], counts [E], offsets [E + 1], and sums over tokens: of p [E], of lse^2 []."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse, probs = _softmax(wide)
    experts = _largest(wide, topk)
    weights = probs.gather(1, experts)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=logits.device)
    counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())
    offsets = counts.new_empty(logits.shape[1] + 1)
    offsets[0] = 0
    torch.cumsum(counts, 0, out=offsets[1:])
    return weights, experts, counts, offsets, probs.sum(0), lse.square().sum()


def backward(
    grad_weights: torch.Tensor,
    grad_sums: torch.Tensor,
    grad_z: torch.Tensor,
    logits: torch.Tensor,
    experts: torch.Tensor,
    renormalize: bool,
) -> torch.Tensor:
    """Return the gradient of the logits [T, E].

    With g the gradient of p and z that of sum(lse^2): dl = p (g - sum(p g)) + 2 z lse p. Renormalised weights give
    g[e_j] = (dw_j - sum_i dw_i w_i) / sum_i p[e_i].

    Args:
        grad_weights: of the weights [T, k].
        grad_sums: of the sums over tokens of p [E].
        grad_z: of the sum of lse^2, a scalar.
        logits: [T, E].
        experts: [T, k].
        renormalize: as in forward.
    """
    wide = logits.to(grad_weights.dtype)
    lse, probs = _softmax(wide)
    if renormalize:
        chosen = probs.gather(1, experts)
        total = chosen.sum(-1, keepdim=True)
        grad_weights = (grad_weights - (grad_weights * chosen).sum(-1, keepdim=True) / total) / total
    grad_probs = grad_sums.expand_as(probs).scatter_add(1, experts, grad_weights)
    inner = (probs * grad_probs).sum(-1, keepdim=True)
    return (probs * (grad_probs - inner + 2.0 * grad_z * lse)).to(logits.dtype).contiguous()


def _largest(wide: torch.Tensor, topk: int) -> torch.Tensor:
    """Return the indices [T, k] of the largest values of each row, in order, equal ones by index.

    By k maxima, which torch defines to be the first of equals: for [2048, 60] and k = 4, one thread, 0.7 ms; a stable
    sort takes 3.7 ms. Integers that sort like the floats leave room for a value below -inf.
    """
    integer = torch.int64 if wide.dtype == torch.float64 else torch.int32
    lowest, highest = torch.iinfo(integer).min, torch.iinfo(integer).max
    bits = (wide + 0.0).view(integer)  # -0.0 + 0.0 is 0.0
    keys = torch.where(bits >= 0, bits, bits ^ highest).masked_fill_(wide.isnan(), highest)
    largest = keys.new_empty(*wide.shape[:-1], topk, dtype=torch.int64)
    for slot in range(topk):
        index = keys.max(-1, keepdim=True).indices
        keys.scatter_(-1, index, lowest)
        largest[:, slot : slot + 1] = index
    return largest


def _softmax(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lse = log(sum(exp(l))) [T, 1] and exp(l - lse) [T, E]; a NaN makes its whole row NaN."""
    return torch.logsumexp(wide, -1, keepdim=True), torch.softmax(wide, -1)
