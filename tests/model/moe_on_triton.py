"""Prints how far the MoE layer on Triton kernels is from the one on the references: in one operation, and in modules.

To be started with TRITON_INTERPRET=1: Triton decides at import whether it interprets.
"""

from __future__ import annotations

import json

import torch

from megatron_qwen import ops
from megatron_qwen.model.build import build_model
from megatron_qwen.testing.tiny import tiny_moe


def run(layer, x):
    """Return output and gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y, _ = layer(x)
    y.square().sum().backward()
    return [
        y.detach(),
        x.grad,
        *(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in layer.parameters()),
    ]


def main() -> None:
    torch.manual_seed(0)
    config = tiny_moe(layers=1, hidden=32, heads=2, kv_heads=1, expert_ffn=16, shared_ffn=32, router_aux_loss_coef=0.1)
    layer = build_model(config, dtype=torch.float32, backend="local").decoder.layers[0].mlp
    x = torch.randn(5, 2, 32)
    errors = []
    for layer.in_one_operation in (True, False):
        results = {}
        for backend in ("reference", "triton"):
            with ops.use_backend(backend):
                results[backend] = run(layer, x)
        for ours, reference in zip(results["triton"], results["reference"], strict=True):
            errors.append(float((ours - reference).norm() / reference.norm().clamp(min=1e-9)))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
