"""Megatron-Core's speed and memory switches: checked against this machine, then handed through.

A switch that cannot work here is an error with the reason; none is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_qwen import compat
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.training.recipe import Recipe
from megatron_qwen.training.recipe_execution import PerformanceRecipe


def overlaps_p2p(recipe: Recipe) -> bool:
    """Whether pipeline sends overlap with compute: as asked, else exactly for interleaved pipelines."""
    asked = recipe.performance.overlap_p2p_comm
    return recipe.parallel.vpp > 1 if asked is None else asked


def check_performance(recipe: Recipe, config: QwenConfig) -> None:
    """Refuse switches that need what this machine, version, model or layout does not have.

    Raises:
        ConfigError: every such switch with its reason.
    """
    found = [
        *_machine_problems(recipe.performance),
        *_optimizer_problems(recipe),
        *_moe_problems(recipe.performance, config),
    ]
    if found:
        raise ConfigError("performance switches: " + "; ".join(found))


def _machine_problems(performance: PerformanceRecipe) -> Iterator[str]:
    import torch

    has_cuda, has_te = torch.cuda.is_available(), compat.has_transformer_engine()
    needs_te = {
        "fp8": performance.fp8 is not None,
        "tp_comm_overlap": performance.tp_comm_overlap,
        "moe_permute_fusion": performance.moe_permute_fusion,
        "precision_aware_optimizer": performance.precision_aware_optimizer,
    }
    needs_cuda = {
        **needs_te,
        "cuda_graphs": performance.cuda_graphs,
        "optimizer_cpu_offload": performance.optimizer_cpu_offload,
        "defer_embedding_wgrad_compute": performance.defer_embedding_wgrad_compute,
    }
    for name, is_on in needs_cuda.items():
        if is_on and not has_cuda:
            yield f"{name} needs a CUDA device, and torch sees none"
        elif is_on and name in needs_te and not has_te:
            yield f"{name} needs Transformer Engine, which is not installed (pip install transformer-engine[pytorch])"
    if performance.fp8 and has_cuda and torch.cuda.get_device_capability() < (8, 9):
        yield f"fp8 needs compute capability 8.9 or newer, {torch.cuda.get_device_name()} has less"
    if performance.fuse_linear_cross_entropy and performance.defer_embedding_wgrad_compute:
        yield "fuse_linear_cross_entropy and defer_embedding_wgrad_compute exclude each other: the one has no logits"
    if performance.fp8_param_gather and not performance.fp8:
        yield "fp8_param_gather needs fp8"
    if performance.gradient_accumulation_fusion and has_cuda and not (has_te or compat.has_apex_gradient_fusion()):
        yield "gradient_accumulation_fusion needs Transformer Engine or apex with its fused weight-gradient kernel"


def _optimizer_problems(recipe: Recipe) -> Iterator[str]:
    performance, distributed = recipe.performance, recipe.optimizer.distributed
    if performance.overlap_param_gather and not distributed:
        yield "overlap_param_gather needs optimizer.distributed"
    if performance.overlap_param_gather and not performance.overlap_grad_reduce:
        yield "overlap_param_gather needs overlap_grad_reduce"
    if performance.align_param_gather and not performance.overlap_param_gather:
        yield "align_param_gather needs overlap_param_gather"
    if performance.precision_aware_optimizer and not distributed:
        yield "precision_aware_optimizer needs optimizer.distributed"
    if performance.overlap_param_gather_with_optimizer_step and not (
        performance.overlap_param_gather and recipe.parallel.vpp > 1
    ):
        yield "overlap_param_gather_with_optimizer_step needs overlap_param_gather and parallel.vpp > 1"
    if performance.bucket_size is not None and not performance.overlap_grad_reduce:
        yield "bucket_size has no effect without overlap_grad_reduce"
    if performance.defer_embedding_wgrad_compute and not fuses_gradient_accumulation(performance):
        yield "defer_embedding_wgrad_compute needs gradient_accumulation_fusion"


def _moe_problems(performance: PerformanceRecipe, config: QwenConfig) -> Iterator[str]:
    asked = {
        "moe_grouped_gemm": performance.moe_grouped_gemm,
        "moe_token_dispatcher": performance.moe_token_dispatcher,
        "moe_shared_expert_overlap": performance.moe_shared_expert_overlap,
        "moe_permute_fusion": performance.moe_permute_fusion,
    }
    for name, value in asked.items():
        if value and not config.is_moe:
            yield f"{name} needs a mixture-of-experts model"


def fuses_gradient_accumulation(performance: PerformanceRecipe) -> bool:
    """Whether weight gradients are added inside the GEMM: as asked, else where it needs nothing (on a CPU)."""
    import torch

    if performance.gradient_accumulation_fusion is None:
        return not torch.cuda.is_available()
    return performance.gradient_accumulation_fusion


def transformer_overrides(recipe: Recipe, config: QwenConfig) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig that training sets, on top of the model's own."""
    from megatron_qwen.parallel.device import communication_backend

    performance = recipe.performance
    fields: dict[str, Any] = {
        # Gradients are sums over tokens, divided once by the tokens of the global batch.
        "calculate_per_token_loss": True,
        "overlap_p2p_comm": overlaps_p2p(recipe),
        "batch_p2p_comm": not overlaps_p2p(recipe),
        # Freeing an output whose overlapped send is still under way is safe on a CUDA stream only: over gloo the
        # next stage then receives whatever took its place.
        "deallocate_pipeline_outputs": recipe.parallel.pp > 1 and communication_backend() != "gloo",
        "gradient_accumulation_fusion": fuses_gradient_accumulation(performance),
        "cp_comm_type": performance.cp_comm_type,
        **_recompute_fields(performance),
    }
    dropouts = {"attention_dropout": recipe.model.attention_dropout, "hidden_dropout": recipe.model.hidden_dropout}
    fields |= {name: value for name, value in dropouts.items() if value is not None}
    if performance.tp_comm_overlap:
        fields["tp_comm_overlap"] = True
    if performance.defer_embedding_wgrad_compute:
        fields["defer_embedding_wgrad_compute"] = True
    if performance.fp8:
        fields |= {
            "fp8": performance.fp8,
            "fp8_recipe": performance.fp8_recipe,
            "fp8_param": performance.fp8_param_gather,
        }
    if performance.cuda_graphs:
        fields["cuda_graph_impl"] = "transformer_engine" if compat.has_transformer_engine() else "local"
    if config.is_moe:
        fields |= _moe_fields(recipe)
    return fields


def _recompute_fields(performance: PerformanceRecipe) -> dict[str, Any]:
    if performance.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": performance.recompute_method,
            "recompute_num_layers": performance.recompute_num_layers,
        }
    if performance.recompute == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(performance.recompute_modules) or ["core_attn"],
        }
    return {}


def _moe_fields(recipe: Recipe) -> dict[str, Any]:
    performance = recipe.performance
    asked = {
        "moe_grouped_gemm": performance.moe_grouped_gemm,
        "moe_token_dispatcher_type": performance.moe_token_dispatcher,
        "moe_shared_expert_overlap": performance.moe_shared_expert_overlap or None,
        "moe_permute_fusion": performance.moe_permute_fusion or None,
    }
    return {name: value for name, value in asked.items() if value is not None}
