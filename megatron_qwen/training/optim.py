"""DDP and the optimizer, both Megatron-Core's, from the recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_qwen import compat
from megatron_qwen.parallel.adam import FusedLayoutAdam
from megatron_qwen.training.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer


def wrap_chunks(recipe: Recipe, chunks: Sequence[GPTModel]) -> list[DistributedDataParallel]:
    """Wrap the model chunks of this rank in Megatron's DDP and connect its overlap hooks to the schedules.

    Gradients accumulate and reduce in float32 unless `performance.grad_reduce_in_fp32` is off. They are sums over
    tokens after the schedule, not means: see `apply_update`.
    """
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )

    performance = recipe.performance
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=performance.grad_reduce_in_fp32,
        overlap_grad_reduce=performance.overlap_grad_reduce,
        overlap_param_gather=performance.overlap_param_gather,
        align_param_gather=performance.align_param_gather,
        use_distributed_optimizer=recipe.optimizer.distributed,
        bucket_size=performance.bucket_size,
        pad_buckets_for_high_nccl_busbw=performance.pad_buckets_for_high_nccl_busbw,
        # Non-finite gradients are found by their norm, on all ranks alike; DDP's own check kills one rank.
        check_for_nan_in_grad=False,
    )
    config = chunks[0].config
    wrapped = [
        # Reductions of later chunks of an interleaved pipeline overlap anyway: one bucket each, as Megatron-LM does.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    config.finalize_model_grads_func = reduce_gradient_sums
    if performance.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([chunk.no_sync for chunk in wrapped])
        config.grad_sync_func = _one_or_list([chunk.start_grad_sync for chunk in wrapped])
    if performance.overlap_param_gather and performance.align_param_gather:
        config.param_sync_func = _one_or_list([chunk.start_param_sync for chunk in wrapped])
    return wrapped


def _one_or_list(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def build_optimizer(recipe: Recipe, chunks: Sequence[DistributedDataParallel]) -> MegatronOptimizer:
    """Return AdamW over the chunks' parameters: float32 master weights under bf16, sharded if `distributed`."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides

    adam, performance = recipe.optimizer, recipe.performance
    is_bf16 = recipe.model.dtype == "bf16"
    config = OptimizerConfig(
        optimizer="adam",
        lr=adam.lr,
        min_lr=adam.final_lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.beta1,
        adam_beta2=adam.beta2,
        adam_eps=adam.eps,
        clip_grad=adam.clip_grad,
        bf16=is_bf16,
        params_dtype=torch.bfloat16 if is_bf16 else torch.float32,
        use_distributed_optimizer=adam.distributed,
        overlap_param_gather=performance.overlap_param_gather,
        overlap_param_gather_with_optimizer_step=performance.overlap_param_gather_with_optimizer_step,
        use_precision_aware_optimizer=performance.precision_aware_optimizer,
        optimizer_cpu_offload=performance.optimizer_cpu_offload,
        optimizer_offload_fraction=performance.optimizer_offload_fraction if performance.optimizer_cpu_offload else 0.0,
    )
    optimizer = get_megatron_optimizer(config, list(chunks), config_overrides=get_standard_config_overrides(config))
    compat.repair_expert_grad_norm(_parts(optimizer))
    return optimizer


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def reduce_gradient_sums(model: list[Any], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Megatron-Core's `finalize_model_grads` without its last step, dividing by the tokens of the global batch.

    That is a pass over all gradients (0.8% of a MoE training step on a CPU) and two collectives; `apply_update` does
    it together with clipping.

    Args:
        model: chunks.
        num_tokens: of this rank; given where gradients are sums over tokens (`calculate_per_token_loss`).
        options: of `finalize_model_grads`.
    """
    from megatron.core.distributed import finalize_model_grads

    assert num_tokens is not None, "gradients are not sums over tokens: calculate_per_token_loss is off"
    finalize_model_grads(model, None, **options)


@torch.no_grad()
def measure_grad_norm(optimizer: MegatronOptimizer) -> float:
    """Move the reduced gradients to the master weights and return their global 2-norm. Collective.

    The norm counts every parameter of the model once, whatever the layout. Call once per step, before
    `apply_update`.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def apply_update(optimizer: MegatronOptimizer, grad_norm: float, *, num_tokens: float) -> None:
    """Divide the gradients by the tokens, clip to the configured norm and step. Collective.

    Args:
        optimizer: after `measure_grad_norm`.
        grad_norm: what that returned divided by `num_tokens`, finite on every rank.
        num_tokens: unmasked tokens of the global batch, over which the gradients are sums.
    """
    assert math.isfinite(grad_norm), grad_norm
    parts = [part for part in _parts(optimizer) if not getattr(part, "is_stub_optimizer", False)]
    try:
        for part in parts:
            # As Megatron-Core's clip_grad_by_total_norm_fp32 clips.
            limit = part.config.clip_grad
            clipping = min(1.0, limit / (grad_norm + 1e-6)) if limit > 0 else 1.0
            divide_gradients(part, num_tokens / clipping)
        optimizer.step_with_ready_grads()
    finally:
        # If one part's step raised, others must not divide by these tokens whenever they step next.
        for part in parts:
            if isinstance(part.optimizer, FusedLayoutAdam):
                part.optimizer.gradient_divisor = 1.0


def divide_gradients(part: MegatronOptimizer, divisor: float) -> None:
    """Divide the gradients of the master weights, within the update where the optimizer can do that."""
    from megatron.core.optimizer import clip_grads

    if isinstance(part.optimizer, FusedLayoutAdam):
        part.optimizer.gradient_divisor = divisor
        return
    name = "decoupled_grad" if part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
    grads = [grad for p in part.get_parameters() if (grad := getattr(p, name, None)) is not None]
    if grads:
        noop_flag = torch.zeros(1, dtype=torch.int, device=grads[0].device)
        clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, noop_flag, [grads, grads], 1.0 / divisor)
