"""From `QwenConfig` to Megatron-Core's `TransformerConfig`.

Three groups of fields: the architecture (fixed by the model), the parallel layout (fixed by the
layout), and everything else, for which there are defaults here and which `overrides` may set.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from megatron_qwen import compat
from megatron_qwen.errors import ConfigError
from megatron_qwen.model import dual_chunk
from megatron_qwen.model.config import QwenConfig, did_you_mean
from megatron_qwen.model.rope import yarn_fields
from megatron_qwen.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def make_transformer_config(
    config: QwenConfig, layout: ParallelLayout | None = None, *, dtype: torch.dtype | None = None, **overrides: Any
) -> TransformerConfig:
    """Return Megatron-Core's configuration of a model in a layout.

    Args:
        config: the model.
        layout: parallel sizes; one rank by default.
        dtype: of parameters and activations; bfloat16 by default.
        overrides: further `TransformerConfig` fields: fusions, recomputation, FP8, CUDA graphs,
            dropout, coefficients. Those that `config` or `layout` decide are refused.

    Raises:
        ConfigError: an unknown or refused override, a layout that does not fit the number of layers,
            or a combination that Megatron-Core itself refuses (its message is passed on).
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    layout = layout or ParallelLayout()
    dtype = torch.bfloat16 if dtype is None else dtype
    fixed = architecture_fields(config) | layout.transformer_config_fields(config.num_hidden_layers) | _precision(dtype)
    _require_known(overrides, fixed, {field.name for field in dataclasses.fields(TransformerConfig)})
    impl = overrides.get("transformer_impl") or ("transformer_engine" if transformer_engine_by_default() else "local")
    fields = _defaults(config, layout, impl) | _as_parsed(layout) | overrides | {"transformer_impl": impl}
    try:
        with warnings.catch_warnings():
            # Said of the field's own default, in every model.
            warnings.filterwarnings("ignore", message="full scope is deprecated")
            result = TransformerConfig(**(fields | fixed))
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"megatron-core refuses this configuration: {error}") from error
    for name, value in yarn_fields(config.rope_scaling).items():
        setattr(result, name, value)
    setattr(result, dual_chunk.ATTRIBUTE, dual_chunk.DualChunk.of(config))
    return result


def transformer_engine_by_default() -> bool:
    """Whether modules are taken from Transformer Engine unless asked otherwise: it is installed and CUDA is there."""
    return torch.cuda.is_available() and compat.has_transformer_engine()


def architecture_fields(config: QwenConfig) -> dict[str, Any]:
    """Return the `TransformerConfig` fields that the model alone decides."""
    fields: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "rotary_interleaved": False,
    }
    if not config.is_moe:
        return fields
    is_moe = config.moe_layers()
    return fields | {
        "num_moe_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
        "moe_layer_freq": 1 if all(is_moe) else [int(each) for each in is_moe],
        # Softmax over all experts, then top-k. Renormalising the chosen ones (norm_topk_prob) is the same as
        # the softmax of the chosen logits, which is what Megatron computes when it takes the top-k first.
        "moe_router_pre_softmax": not config.norm_topk_prob,
    }


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"dtype: got {dtype}, expected torch.float32, torch.bfloat16 or torch.float16")
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }


def _defaults(config: QwenConfig, layout: ParallelLayout, impl: str) -> dict[str, Any]:
    on_cuda = torch.cuda.is_available()
    fields: dict[str, Any] = {
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
        "init_method_std": config.initializer_range,
        # The fusions are TorchScript, inductor or CUDA kernels: without a GPU they fall back or compile for long.
        "bias_activation_fusion": on_cuda,
        "bias_dropout_fusion": on_cuda,
        "masked_softmax_fusion": on_cuda,
        "apply_rope_fusion": on_cuda and impl == "transformer_engine" and config.rope_scaling is None,
        "gradient_accumulation_fusion": False,
        # The interleaved schedule with two pipeline ranks is wrong without it; see parallel/layout.py.
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
    }
    if config.is_moe:
        fields |= {
            # The other dispatcher, Megatron's default, refuses variable sequence lengths and does not scale with EP.
            "moe_token_dispatcher_type": "alltoall",
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": megatron_aux_loss_coefficient(config),
            "moe_grouped_gemm": impl == "transformer_engine",
        }
    return fields


def _as_parsed(layout: ParallelLayout) -> dict[str, Any]:
    """Return what Megatron-LM's argument parser sets in every model, so that its configurations equal ours.

    None of it changes a result here: outputs are deallocated between pipeline stages only, `cp_comm_type` is
    read with context parallelism only, the seed by Megatron's inference engine only, and one weight shard
    per rank is the default.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {
        "deallocate_pipeline_outputs": True,
        "cp_comm_type": "p2p",
        "inference_sampling_seed": 1234,
        "tensor_parallel_num_weight_shards": layout.tp,
        "expert_tensor_parallel_num_weight_shards": layout.expert_tensor_parallel_size,
    }
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    return {name: value for name, value in fields.items() if name in known}


def megatron_aux_loss_coefficient(config: QwenConfig) -> float:
    """Return the per-layer coefficient that puts Megatron's load-balancing loss on transformers' footing.

    With E experts, k chosen per token, L MoE layers, T tokens, f_i the number of choices of expert i
    over T and P_i its mean probability:

    * transformers adds c * E * sum_i f_i P_i once, f and P being means over all layers and tokens; at
      balance f_i = k/E and P_i = 1/E, so the sum is c * k;
    * Megatron (`switch_load_balancing_loss_func`) adds per layer c_m * E/k * sum_i f_i P_i, which is
      c_m at balance, so L * c_m over the layers.

    Equal totals at balance need c_m = c * k / L. Off balance the two differ, since transformers
    multiplies means over layers and Megatron takes each layer by itself; for one MoE layer they agree.
    """
    return config.router_aux_loss_coef * config.num_experts_per_tok / sum(config.moe_layers())


def _require_known(overrides: dict[str, Any], fixed: dict[str, Any], known: set[str]) -> None:
    unknown = [name for name in overrides if name not in known]
    if unknown:
        hints = "".join(did_you_mean(name, known) for name in unknown)
        raise ConfigError(
            f"megatron-core {compat.megatron_version()}: no TransformerConfig field {', '.join(unknown)}.{hints}"
        )
    refused = sorted(name for name in overrides if name in fixed and overrides[name] != fixed[name])
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: decided by the model configuration, the layout or dtype; change it there "
            "(dataclasses.replace(config, ...))"
        )
