"""Megatron-Bridge's description of a model, `run_config.yaml`, which it looks for in a step's folder.

`load_model_config` (megatron/bridge/training/model_load_save.py) reads the file with `yaml.safe_load` and builds the
object that `model._target_` names from the entries beside it; a value that is a class or a function is written as
`{_target_: name, _call_: false}`. Entries that are left out keep the defaults of that class. `checkpoint` is read by
`load_checkpoint` when a training goes on from the folder.
"""

from __future__ import annotations

from typing import Any

import yaml

from megatron_qwen.conversion.interfaces import OutputFile, bytes_file
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.model.rope import yarn_fields
from megatron_qwen.model.transformer_config import architecture_fields, megatron_aux_loss_coefficient
from megatron_qwen.parallel.layout import ParallelLayout

RUN_CONFIG_NAME = "run_config.yaml"
_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_HEADER = "# The model in this folder as Megatron-Bridge describes it.\n"


def bridge_file(config: QwenConfig, layout: ParallelLayout | None = None, folder: str = "") -> OutputFile:
    """Return `run_config.yaml`, in a step's folder of the output given with a trailing slash."""
    return bytes_file(folder + RUN_CONFIG_NAME, run_config_yaml(config, layout).encode())


def run_config_yaml(config: QwenConfig, layout: ParallelLayout | None = None) -> str:
    """Return the content of `run_config.yaml`.

    Args:
        config: the model.
        layout: in which it was saved; one rank if None.
    """
    content = {
        "model": model_section(config, layout or ParallelLayout()),
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
    }
    return _HEADER + yaml.safe_dump(content, sort_keys=True)


def model_section(config: QwenConfig, layout: ParallelLayout) -> dict[str, Any]:
    """Return the arguments of Bridge's GPTModelProvider, which is a TransformerConfig with some more fields."""
    dtype = _reference(f"torch.{config.torch_dtype}")
    section: dict[str, Any] = {
        "_target_": _PROVIDER,
        **architecture_fields(config),
        "activation_func": _reference("torch.nn.functional.silu"),
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": 0.0,
        "init_method_std": config.initializer_range,
        "share_embeddings_and_output_weights": config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 1,
        "seq_length": config.max_position_embeddings,
        "position_embedding_type": "rope" if config.rope_scaling is None else "yarn",
        "rotary_base": int(config.rope_theta) if config.rope_theta == int(config.rope_theta) else config.rope_theta,
        "rotary_percent": 1.0,
        **yarn_fields(config.rope_scaling),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": config.torch_dtype == "bfloat16",
        "fp16": config.torch_dtype == "float16",
    }
    return section | layout.transformer_config_fields(config.num_hidden_layers) | _moe_fields(config)


def _moe_fields(config: QwenConfig) -> dict[str, Any]:
    if not config.is_moe:
        return {}
    fields: dict[str, Any] = {
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": megatron_aux_loss_coefficient(config),
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }
    if not all(config.moe_layers()):
        # The provider's own choice is one kind of layer for all.
        fields["transformer_layer_spec"] = {
            "_target_": "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec",
            "_partial_": True,
            "use_transformer_engine": True,
        }
    return fields


def _reference(name: str) -> dict[str, Any]:
    return {"_target_": name, "_call_": False}
