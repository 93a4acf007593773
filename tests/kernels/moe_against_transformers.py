"""Prints how far routing and experts are from transformers' Qwen2MoeSparseMoeBlock with the same weights, as JSON.

Differences are relative to the largest magnitude of each tensor: outputs, all gradients and the auxiliary loss. By the
reference, and by Triton where it is installed: start it with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import importlib.util
import json

import torch
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock, load_balancing_loss_func

from megatron_qwen import ops

TOKENS, EXPERTS, TOPK, HIDDEN, WIDTH, SHARED = 37, 12, 4, 48, 20, 80


def block(renormalize: bool) -> torch.nn.Module:
    config = Qwen2MoeConfig(
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=TOPK,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=SHARED,
        norm_topk_prob=renormalize,
    )
    config._experts_implementation = "eager"
    module = Qwen2MoeSparseMoeBlock(config)
    for seed, parameter in enumerate(module.parameters()):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        parameter.data.copy_(values * parameter.shape[-1] ** -0.5)
    return module


def differences(renormalize: bool) -> dict[str, float]:
    module = block(renormalize)
    x = torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(99))
    leaves = {"x": x.requires_grad_(), **dict(module.named_parameters())}
    y = module(x)
    logits = torch.nn.functional.linear(x.view(-1, HIDDEN), module.gate.weight)
    balance = load_balancing_loss_func((logits,), EXPERTS, TOPK)
    theirs = torch.autograd.grad(y.square().sum() + balance, list(leaves.values()))

    shared = module.shared_expert
    packed = torch.cat([shared.gate_proj.weight, shared.up_proj.weight])
    rows = x.view(-1, HIDDEN)
    routing = ops.moe_routing(torch.nn.functional.linear(rows, module.gate.weight), TOPK, renormalize=renormalize)
    ours = ops.moe_mlp(
        rows,
        routing.weights,
        ops.expert_order(routing.experts, EXPERTS),
        module.experts.gate_up_proj.unbind(),
        module.experts.down_proj.unbind(),
        shared=ops.SharedExpert(packed, shared.down_proj.weight, module.shared_expert_gate.weight),
    ).view_as(y)
    our_balance = ops.huggingface_balance_loss(routing.counts, routing.probability_sums, TOKENS)
    mine = torch.autograd.grad(ours.square().sum() + our_balance, list(leaves.values()))
    pairs = {"y": (ours, y), "auxiliary loss": (our_balance, balance)}
    pairs |= {name: pair for name, *pair in zip(leaves, mine, theirs, strict=True)}
    return {name: float((a - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}


if __name__ == "__main__":
    found = {}
    for backend in ("reference", "triton") if importlib.util.find_spec("triton") else ("reference",):
        for flag in (False, True):
            with ops.use_backend(backend):
                found |= {f"{name}, {flag}, {backend}": each for name, each in differences(flag).items()}
    print(json.dumps(found))
