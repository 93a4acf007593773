"""What the ranks of test_parallel_gradients.py run: one forward and backward, gradients put together again."""

from __future__ import annotations

from typing import Any

import torch

from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import leave_layout


def gradients(
    config: QwenConfig, layout: ParallelLayout, weights: dict[str, torch.Tensor] | None, **overrides: Any
) -> dict[str, Any]:
    """Return loss, and the full gradient of every parameter of this rank, for weights given in full (None: make them).

    Experts are named by their index in the whole model.
    """
    from megatron_qwen.model.build import build_model

    model = build_model(config, layout=layout, dtype=torch.float32, **overrides)
    if weights is None:
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(p.shape, generator=generator) * 0.2 for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(part_of(name, parameter, weights[global_name(name, config)], config))
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    loss = model(tokens, torch.arange(16).expand(2, 16), None, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    grads = {global_name(name, config): whole(name, parameter) for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "grads": grads, "weights": weights}


def gradients_of_all(
    cases: list[tuple[QwenConfig, dict[str, torch.Tensor], ParallelLayout, dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Run `gradients` for several models, layouts and overrides in one set of ranks."""
    from megatron_qwen.parallel import groups

    results = []
    for config, weights, layout, overrides in cases:
        groups.initialize(layout)
        results.append(gradients(config, layout, weights, **overrides))
        # Another layout over the same process group: quicker than new processes.
        leave_layout()
    return results


def is_expert(name: str) -> bool:
    return ".local_experts." in name


def global_name(name: str, config: QwenConfig) -> str:
    from megatron.core import parallel_state

    if not is_expert(name):
        return name
    before, after = name.split(".local_experts.")
    index, rest = after.split(".", 1)
    here = config.num_experts // parallel_state.get_expert_model_parallel_world_size()
    number = int(index) + here * parallel_state.get_expert_model_parallel_rank()
    return f"{before}.local_experts.{number}.{rest}"


def is_gated(name: str) -> bool:
    return name.endswith("linear_fc1.weight")


def part_of(name: str, parameter: torch.Tensor, full: torch.Tensor, config: QwenConfig) -> torch.Tensor:
    from megatron.core import parallel_state

    if parameter.shape == full.shape:
        return full
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    if is_gated(name):
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim=parameter.partition_dim)[rank]


def whole(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Gather or add up a gradient as Megatron's training step does (tensor parallel; sums under sequence parallel)."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    size = group.size()
    grad = parameter.grad.contiguous()
    if size == 1:
        return grad
    if is_expert(name) and parallel_state.get_expert_tensor_parallel_world_size() == 1:
        if parallel_state.get_expert_model_parallel_world_size() == 1:
            torch.distributed.all_reduce(grad, group=group)
        return grad  # with expert parallelism over the same ranks, the expert is here only
    if getattr(parameter, "tensor_model_parallel", False):
        parts = [torch.empty_like(grad) for _ in range(size)]
        torch.distributed.all_gather(parts, grad, group=group)
        if is_gated(name):
            return torch.cat([torch.cat(halves) for halves in zip(*(part.chunk(2) for part in parts), strict=True)])
        return torch.cat(parts, dim=parameter.partition_dim)
    if getattr(parameter, "sequence_parallel", False):
        torch.distributed.all_reduce(grad, group=group)
    return grad
