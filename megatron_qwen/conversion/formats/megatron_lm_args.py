"""The descriptions of a model that travel with a Megatron checkpoint: Megatron-LM's arguments.

Megatron-LM keeps the parsed command line of the run in every checkpoint (`args`) and takes the model from it
(`load_args_from_checkpoint`, under --use-checkpoint-args) or compares it with the new command line
(`check_checkpoint_args`); both in megatron/training/checkpointing.py.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_qwen.checkpoint.inside import check_inside
from megatron_qwen.conversion.formats.legacy.layout import vocabulary_rows
from megatron_qwen.errors import ConfigError, IncompleteInputError
from megatron_qwen.model.config import QwenConfig, YarnScaling
from megatron_qwen.model.flags import pipeline_pattern
from megatron_qwen.model.hf_config import dual_chunk_attention_from_hf, dual_chunk_attention_to_hf
from megatron_qwen.model.rope import yarn_fields
from megatron_qwen.model.transformer_config import megatron_aux_loss_coefficient
from megatron_qwen.parallel.layout import ParallelLayout

logger = logging.getLogger(__name__)

_CHUNKS = "dual_chunk_attention_config"


def megatron_lm_args(
    config: QwenConfig,
    layout: ParallelLayout | None = None,
    *,
    ckpt_format: str = "torch_dist",
    transformer_impl: str = "transformer_engine",
) -> argparse.Namespace:
    """Return the Megatron-LM arguments that describe a model and its layout, as a checkpoint of that run carries them.

    Only plain values and a torch dtype, which torch opens with `weights_only`.

    Args:
        config: the model; its dtype is the parameters'.
        layout: parallel sizes; one rank if None.
        ckpt_format: "torch_dist" or "torch".
        transformer_impl: "transformer_engine" or "local".
    """
    layout = layout or ParallelLayout()
    arguments = {
        **_model_arguments(config),
        **_position_arguments(config),
        **(_moe_arguments(config, transformer_impl) if config.is_moe else {"num_experts": None}),
        **_parallel_arguments(config, layout),
        "padded_vocab_size": vocabulary_rows(config, layout),
        # The released models' rows are no multiple of what Megatron-LM pads to; it must not pad again.
        "make_vocab_size_divisible_by": 1,
        "ckpt_format": ckpt_format,
        "transformer_impl": transformer_impl,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    return argparse.Namespace(**arguments)


def _model_arguments(config: QwenConfig) -> dict[str, Any]:
    dtype: torch.dtype = getattr(torch, config.torch_dtype)
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "normalization": "RMSNorm",
        # Older releases call these two the first name of each pair, newer ones the second.
        "norm_epsilon": config.rms_norm_eps,
        "layernorm_epsilon": config.rms_norm_eps,
        "apply_layernorm_1p": False,
        "layernorm_zero_centered_gamma": False,
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
        "init_method_std": config.initializer_range,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "tokenizer_type": "HuggingFaceTokenizer",
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
    }


def _position_arguments(config: QwenConfig) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "position_embedding_type": "rope",
        "add_position_embedding": True,  # Megatron-LM's default; it concerns learned embeddings, which rope has none of
        "rotary_base": int(config.rope_theta) if config.rope_theta == int(config.rope_theta) else config.rope_theta,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
    }
    if config.dual_chunk_attention is not None:
        # Megatron-LM has no such argument and passes over it; for who finds the checkpoint without its config.json.
        arguments[_CHUNKS] = dual_chunk_attention_to_hf(config.dual_chunk_attention)
    scaling = config.rope_scaling
    if scaling is None:
        return arguments
    fields = yarn_fields(scaling)
    return arguments | {
        "position_embedding_type": "yarn",
        "rotary_scaling_factor": scaling.factor,
        "yarn_original_max_position_embeddings": scaling.original_max_position_embeddings,
        "yarn_beta_fast": scaling.beta_fast,
        "yarn_beta_slow": scaling.beta_slow,
        "yarn_correction_range_round_to_int": scaling.truncate,
        "mscale": fields["yarn_mscale"],
        "mscale_all_dim": fields["yarn_mscale_all_dim"],
    }


def _moe_arguments(config: QwenConfig, transformer_impl: str) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
        "moe_layer_freq": [int(is_moe) for is_moe in config.moe_layers()],
        "moe_router_pre_softmax": not config.norm_topk_prob,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": megatron_aux_loss_coefficient(config),
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": transformer_impl == "transformer_engine",
    }


def _parallel_arguments(config: QwenConfig, layout: ParallelLayout) -> dict[str, Any]:
    stages = layout.layers_per_stage(config.num_hidden_layers)
    is_uneven = layout.pp_layout is not None and layout.pp > 1
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": stages[0] if layout.vpp > 1 and not is_uneven else None,
        "pipeline_model_parallel_layout": pipeline_pattern(stages) if is_uneven else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel_size,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.sequence_parallel,
    }


# What a model of this family has and others may not: argument, value, what it stands for.
_FAMILY: tuple[tuple[str, Any, str], ...] = (
    ("swiglu", True, "SwiGLU"),
    ("normalization", "RMSNorm", "RMSNorm"),
    ("add_qkv_bias", True, "biases on query, key and value"),
    ("add_bias_linear", False, "no other biases"),
    ("apply_layernorm_1p", False, "norm weights as they are"),
    ("layernorm_zero_centered_gamma", False, "norm weights as they are"),
    ("qk_layernorm", False, "no norms on query and key (Qwen3 has them)"),
    ("multi_latent_attention", False, "no latent attention"),
    ("mtp_num_layers", None, "no multi-token prediction"),
    ("rotary_percent", 1.0, "rotary embedding of all of a head"),
    ("rotary_interleaved", False, "rotary embedding in halves"),
    ("moe_router_score_function", "softmax", "a softmax router"),
)
_NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "max_position_embeddings")
_NEEDED_TOO = ("layernorm_epsilon", "rotary_base", "padded_vocab_size", "untie_embeddings_and_output_weights")
_NEEDED_BY_MOE = ("moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")


def find_config(step_folder: Path, hf_folders: Sequence[Path], arguments: Callable[[], object]) -> QwenConfig:
    """Return the model of a Megatron checkpoint: from its config.json or, without one, from Megatron-LM's arguments.

    Args:
        step_folder: for messages.
        hf_folders: where config.json may lie, first choice first.
        arguments: gives `args` of the checkpoint, or anything else if there are none.

    Raises:
        IncompleteInputError: there is neither, or the arguments do not suffice.
        ConfigError: they describe a model that is not of this family.
    """
    for folder in hf_folders:
        if (folder / "config.json").is_file():
            check_inside(folder, "config.json", folder / "config.json")
            return QwenConfig.from_hf(folder)
    found = arguments()
    if not isinstance(found, argparse.Namespace):
        raise IncompleteInputError(
            f"{step_folder}: neither config.json in {hf_folders[0]} nor Megatron-LM arguments in the checkpoint, so "
            "the model is not known; put its config.json there, or give it with --config"
        )
    config, notes = config_from_args(found, str(step_folder))
    for note in notes:
        logger.warning("%s: %s", step_folder, note)
    return config


def config_from_args(arguments: argparse.Namespace, where: str) -> tuple[QwenConfig, tuple[str, ...]]:
    """Return the model that Megatron-LM's arguments describe, and what they do not say, one line each.

    Args:
        arguments: `args` of a checkpoint.
        where: the file, for messages.

    Raises:
        IncompleteInputError: they lack something that the model needs.
        ConfigError: they describe a model that is not of this family.
    """
    is_moe = getattr(arguments, "num_experts", None) is not None
    if getattr(arguments, "layernorm_epsilon", None) is None:
        arguments = argparse.Namespace(
            **{**vars(arguments), "layernorm_epsilon": getattr(arguments, "norm_epsilon", None)}
        )
    needed = (*_NEEDED, *_NEEDED_TOO, *(_NEEDED_BY_MOE if is_moe else ()))
    absent = [name for name in needed if getattr(arguments, name, None) is None]
    if absent:
        raise IncompleteInputError(
            f"{where}: the arguments in it do not say {', '.join(absent)}; give the model's config.json with --config"
        )
    wrong = [
        f"{name} is {getattr(arguments, name)!r}, expected {value!r}: {meaning}"
        for name, value, meaning in _FAMILY
        if getattr(arguments, name, None) not in (None, value)
    ]
    if arguments.position_embedding_type not in ("rope", "yarn"):
        wrong.append(f"position_embedding_type is {arguments.position_embedding_type!r}, expected 'rope' or 'yarn'")
    if wrong:
        raise ConfigError(f"{where}: not a Qwen2 or Qwen2-MoE model: {'; '.join(wrong)}")
    has_groups = getattr(arguments, "group_query_attention", False)
    config = QwenConfig(
        model_type="qwen2_moe" if is_moe else "qwen2",
        vocab_size=arguments.padded_vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.ffn_hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_attention_heads,
        num_key_value_heads=arguments.num_query_groups if has_groups else arguments.num_attention_heads,
        max_position_embeddings=arguments.max_position_embeddings,
        rms_norm_eps=arguments.layernorm_epsilon,
        rope_theta=float(arguments.rotary_base),
        rope_scaling=_scaling_from_args(arguments),
        dual_chunk_attention=dual_chunk_attention_from_hf(where, getattr(arguments, _CHUNKS, None)),
        tie_word_embeddings=not arguments.untie_embeddings_and_output_weights,
        initializer_range=getattr(arguments, "init_method_std", None) or 0.02,
        attention_dropout=getattr(arguments, "attention_dropout", None) or 0.0,
        torch_dtype=_dtype_name(getattr(arguments, "params_dtype", None)),
        **(_moe_from_args(arguments) if is_moe else {}),
    )
    notes = (
        "there is no config.json; the model is taken from the arguments that Megatron-LM saved",
        f"they do not say how many of the {config.vocab_size:,} vocabulary rows are padding: all are kept",
        "they do not say which tokens begin and end a text (bos_token_id, eos_token_id)",
    )
    return config, notes


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else "bfloat16"


def _scaling_from_args(arguments: argparse.Namespace) -> YarnScaling | None:
    if arguments.position_embedding_type != "yarn":
        return None
    return YarnScaling(
        factor=arguments.rotary_scaling_factor,
        original_max_position_embeddings=arguments.yarn_original_max_position_embeddings,
        beta_fast=arguments.yarn_beta_fast,
        beta_slow=arguments.yarn_beta_slow,
        mscale=getattr(arguments, "mscale", None),
        mscale_all_dim=getattr(arguments, "mscale_all_dim", None),
        truncate=getattr(arguments, "yarn_correction_range_round_to_int", True),
    )


def _moe_from_args(arguments: argparse.Namespace) -> dict[str, Any]:
    frequency = getattr(arguments, "moe_layer_freq", 1)
    layers = range(arguments.num_layers)
    # A number n makes every n-th layer a MoE layer, the first among them; a list says it for each.
    is_moe = [not i % frequency for i in layers] if isinstance(frequency, int) else [bool(each) for each in frequency]
    return {
        "num_experts": arguments.num_experts,
        "num_experts_per_tok": arguments.moe_router_topk,
        "moe_intermediate_size": arguments.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": arguments.moe_shared_expert_intermediate_size,
        "norm_topk_prob": not getattr(arguments, "moe_router_pre_softmax", False),
        "router_aux_loss_coef": (getattr(arguments, "moe_aux_loss_coeff", None) or 0.0)
        * sum(is_moe)
        / arguments.moe_router_topk,
        "mlp_only_layers": tuple(i for i in layers if not is_moe[i]),
    }
