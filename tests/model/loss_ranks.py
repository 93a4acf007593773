"""What the ranks of test_loss.py run: fused and plain losses of the same weights."""

from __future__ import annotations

from typing import Any

import torch

from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout


def both_ways(config: QwenConfig, layout: ParallelLayout, dtype: torch.dtype, *, in_place: bool) -> dict[str, Any]:
    """Return losses and gradients with and without logits, as (fused, plain) pairs by name.

    Args:
        config: of the model.
        layout: of the ranks.
        dtype: of the parameters.
        in_place: let weight gradients add up in Megatron's fp32 buffers, over two micro-batches.
    """
    results = []
    weights: dict[str, torch.Tensor] = {}
    for fused in (True, False):
        model = build(config, layout, dtype, fused=fused, in_place=in_place)
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(weights.setdefault(name, parameter.detach().clone()))
        results.append(run(model, config, in_place=in_place))
    return {name: (results[0][name], results[1][name]) for name in results[0]}


def build(config: QwenConfig, layout: ParallelLayout, dtype: torch.dtype, *, fused: bool, in_place: bool) -> Any:
    from megatron_qwen.model.build import build_model

    return build_model(
        config, layout=layout, dtype=dtype, fuse_linear_cross_entropy=fused, gradient_accumulation_fusion=in_place
    )


def run(model: Any, config: QwenConfig, *, in_place: bool) -> dict[str, torch.Tensor]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    wrapped = model
    if in_place:
        wrapped = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model, disable_bucketing=True
        )
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(2):
        tokens = torch.randint(0, config.vocab_size, (2, 16), generator=generator)
        mask = torch.randint(0, 2, (2, 16), generator=generator)
        loss = wrapped(tokens, torch.arange(16).expand(2, 16), None, labels=tokens.roll(-1, 1))
        (loss * mask).sum().backward()
        losses.append(loss.detach())
    grads = {name: p.main_grad if in_place else p.grad for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses)} | {name: grad.clone() for name, grad in grads.items()}


def losses_of_layout(cases: list[tuple[QwenConfig, torch.dtype, bool]], layout: ParallelLayout) -> list[dict[str, Any]]:
    """Run `both_ways` for every case on these ranks."""
    from megatron_qwen.parallel import groups

    groups.initialize(layout)
    results = [both_ways(config, layout, dtype, in_place=in_place) for config, dtype, in_place in cases]
    groups.shutdown()
    return results
