"""One MoE layer, forward and backward: ours, Megatron-Core's and transformers', with the same weights and tokens.

Each class is built in a process of its own (see `worker.py`). All make fresh gradients of every parameter and of the
input, as a plain training loop does; balance losses are off.

Shapes: T tokens, H hidden size, E experts, F and Fs widths of a routed and the shared expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from megatron_qwen.model.config import QwenConfig
from megatron_qwen.testing.tiny import tiny_moe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layer_config(sizes: Mapping[str, int]) -> QwenConfig:
    """Return a model of one MoE layer of these sizes (experts, topk, hidden, ffn, shared_ffn)."""
    return tiny_moe(
        layers=1,
        hidden=sizes["hidden"],
        heads=1,
        kv_heads=1,
        vocab=64,
        experts=sizes["experts"],
        topk=sizes["topk"],
        expert_ffn=sizes["ffn"],
        shared_ffn=sizes["shared_ffn"],
        router_aux_loss_coef=0.0,
    )


def layer_flops(sizes: Mapping[str, int]) -> float:
    """Return the floating-point operations of forward and backward: 6 for each weight that a token meets."""
    widths = sizes["topk"] * sizes["ffn"] + sizes["shared_ffn"]
    return 6.0 * sizes["tokens"] * sizes["hidden"] * (3 * widths + sizes["experts"] + 1)


def _weights(sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return router [E, H], fc1 [E, 2F, H], fc2 [E, H, F], and shared_fc1, shared_fc2, shared_gate; fp32."""
    hidden, experts, ffn, shared = (sizes[name] for name in ("hidden", "experts", "ffn", "shared_ffn"))
    shapes = {
        "router": (experts, hidden),
        "fc1": (experts, 2 * ffn, hidden),
        "fc2": (experts, hidden, ffn),
        "shared_fc1": (2 * shared, hidden),
        "shared_fc2": (hidden, shared),
        "shared_gate": (1, hidden),
    }
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.5 if name == "router" else shape[-1] ** -0.5)
        for name, shape in shapes.items()
    }


class _Layer:
    """A layer and its input; `step` is a Runner's."""

    def __init__(self, sizes: Mapping[str, int], dtype: str, module: torch.nn.Module) -> None:
        self.amount, self.flops = float(sizes["tokens"]), layer_flops(sizes)
        generator = torch.Generator().manual_seed(1)
        shape = (sizes["tokens"], 1, sizes["hidden"])
        self._x, self._grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(2))
        self._module = module
        # The check value counts gradients of parameters too, which it would take time to sum in every step.
        self._gradients = 0.0
        self.step()
        squares = [float(p.grad.float().square().sum()) for p in module.parameters() if p.grad is not None]
        self._gradients = math.sqrt(sum(squares))

    def step(self) -> float:
        """Run forward and backward; returns norms of the output, of the input's and of the first step's gradients."""
        for parameter in self._module.parameters():
            parameter.grad = None
        x = self._x.clone().requires_grad_()
        output = self._module(x)
        y = output[0] if isinstance(output, tuple) else output
        y.backward(self._grad)
        assert x.grad is not None
        return float(y.detach().float().norm()) + float(x.grad.float().norm()) + self._gradients


def _megatron_layer(sizes: Mapping[str, int], dtype: str) -> Any:
    from megatron_qwen.model.build import build_model

    model = build_model(layer_config(sizes), dtype=DTYPES[dtype], backend="local")
    layer = model.decoder.layers[0].mlp
    weights = _weights(sizes)
    shared = layer.shared_experts
    with torch.no_grad():
        layer.router.weight.copy_(weights["router"])
        for index, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight.copy_(weights["fc1"][index])
            expert.linear_fc2.weight.copy_(weights["fc2"][index])
        shared.linear_fc1.weight.copy_(weights["shared_fc1"])
        shared.linear_fc2.weight.copy_(weights["shared_fc2"])
        shared.gate_weight.copy_(weights["shared_gate"])
    return layer.train()


class OurLayer(_Layer):
    """The layer of our local backend."""

    def __init__(self, *, sizes: Mapping[str, int], dtype: str) -> None:
        super().__init__(sizes, dtype, _megatron_layer(sizes, dtype))


class MegatronLayer(_Layer):
    """Megatron-Core's MoELayer, TopKRouter and SequentialMLP, on the same modules (with our SwiGLU)."""

    def __init__(self, *, sizes: Mapping[str, int], dtype: str) -> None:
        from megatron.core.transformer.moe.experts import SequentialMLP
        from megatron.core.transformer.moe.moe_layer import MoELayer
        from megatron.core.transformer.moe.router import TopKRouter

        layer = _megatron_layer(sizes, dtype)
        layer.__class__, layer.experts.__class__, layer.router.__class__ = MoELayer, SequentialMLP, TopKRouter
        super().__init__(sizes, dtype, layer)


class TransformersLayer(_Layer):
    """transformers' Qwen2MoeSparseMoeBlock, its experts computed as its models do it by default."""

    def __init__(self, *, sizes: Mapping[str, int], dtype: str, experts: str | None = None) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        values = layer_config(sizes).to_hf()
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        options = {} if experts is None else {"experts_implementation": experts}
        block: Any = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], **options).model.layers[0].mlp
        weights = _weights(sizes)
        gate, up = weights["shared_fc1"].chunk(2)
        with torch.no_grad():
            block.gate.weight.copy_(weights["router"])
            block.experts.gate_up_proj.copy_(weights["fc1"])
            block.experts.down_proj.copy_(weights["fc2"])
            block.shared_expert.gate_proj.weight.copy_(gate)
            block.shared_expert.up_proj.weight.copy_(up)
            block.shared_expert.down_proj.weight.copy_(weights["shared_fc2"])
            block.shared_expert_gate.weight.copy_(weights["shared_gate"])
        super().__init__(sizes, dtype, block.train())


class TransformersLoopLayer(TransformersLayer):
    """The same with a loop over the experts, as its sources write it."""

    def __init__(self, *, sizes: Mapping[str, int], dtype: str) -> None:
        super().__init__(sizes=sizes, dtype=dtype, experts="eager")
