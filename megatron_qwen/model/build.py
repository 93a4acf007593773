"""Building Megatron-Core's `GPTModel` for a Qwen configuration."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megatron_qwen import compat
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.model.loss import QwenGPTModel
from megatron_qwen.model.spec import block_spec, resolve_backend
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.device import current_device, install_cpu_platform
from megatron_qwen.parallel.layout import ParallelLayout

logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
    # megatron-core 0.19 says this at every construction; this project supports the versions that have GPTModel.
    lambda record: not record.getMessage().startswith("GPTModel IS DEPRECATED")
)


def build_model(
    config: QwenConfig,
    *,
    layout: ParallelLayout | None = None,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
    parallel_output: bool = True,
    device: torch.device | str | None = None,
    max_sequence_length: int | None = None,
    fuse_linear_cross_entropy: bool | None = None,
    **transformer_config_overrides: Any,
) -> GPTModel:
    """Build this rank's part of a model, randomly initialised.

    Starts a one-rank group if Megatron's parallel state is not initialised.

    Args:
        config: the model.
        layout: parallel sizes; those of the running parallel state by default.
        dtype: of every parameter.
        backend: "auto", "te" or "local"; see `spec.resolve_backend`.
        pre_process: whether this part holds the embedding; by default as pipeline rank and vp_stage say.
        post_process: likewise for the final norm and the output layer.
        vp_stage: virtual pipeline stage, with interleaving.
        parallel_output: leave logits split along the vocabulary between tensor-parallel ranks.
        device: where the parameters are; this rank's device by default; "meta" allocates nothing.
        max_sequence_length: the configuration's max_position_embeddings by default.
        fuse_linear_cross_entropy: compute losses without holding logits; see `loss.resolve_fusion`.
        transformer_config_overrides: fields of `TransformerConfig`; see `transformer_config.py`.

    Returns:
        A `GPTModel` (see `loss.py`) whose parameter names are Megatron-Core's own.

    Raises:
        ConfigError: the layout fits neither the model nor the running parallel state, an unknown
            override, options that exclude each other, or a backend that is not installed.
    """
    layout = _enter(layout)
    overrides: dict[str, Any] = {
        "transformer_impl": "transformer_engine" if resolve_backend(backend) == "te" else "local"
    }
    on_meta = device is not None and torch.device(device).type == "meta"
    if on_meta:
        # Initialising is what costs: the layers then allocate without naming a device, so that meta is taken.
        overrides |= {"use_cpu_initialization": True, "perform_initialization": False}
    overrides |= transformer_config_overrides
    fuses_activation = overrides.get("bias_activation_fusion", torch.cuda.is_available())
    if overrides["transformer_impl"] == "local" and not fuses_activation:
        # The switch by which Megatron's MLPs take the activation module of the layer spec: ours, see swiglu.py.
        overrides.setdefault("use_te_activation_func", True)
    transformer_config = config.to_transformer_config(layout, dtype=dtype, **overrides)
    if pre_process is None:
        pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    if post_process is None:
        post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        model = QwenGPTModel(
            transformer_config,
            num_tokens=config.vocab_size,
            fuse_linear_cross_entropy=fuse_linear_cross_entropy,
            transformer_layer_spec=block_spec(transformer_config, backend=backend, vp_stage=vp_stage),
            vocab_size=padded_vocab_size(config, layout),
            max_sequence_length=max_sequence_length or config.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=config.tie_word_embeddings,
            position_embedding_type="rope" if config.rope_scaling is None else "yarn",
            rotary_base=config.rope_theta,
            vp_stage=vp_stage,
        )
    return model if on_meta else model.to(device=device or current_device(), dtype=dtype)


def build_model_chunks(
    config: QwenConfig, layout: ParallelLayout | None = None, *, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> list[GPTModel]:
    """Build every virtual stage of this pipeline rank, in order; one model without interleaving.

    Args and errors are those of `build_model`.
    """
    layout = _enter(layout)
    stages: list[int | None] = list(range(layout.vpp)) if layout.vpp > 1 else [None]
    return [build_model(config, layout=layout, dtype=dtype, vp_stage=stage, **options) for stage in stages]


def padded_vocab_size(config: QwenConfig, layout: ParallelLayout) -> int:
    """Return the rows of the embedding: vocab_size, rounded up to a multiple of the tensor-parallel size."""
    return -(-config.vocab_size // layout.tp) * layout.tp


def _enter(layout: ParallelLayout | None) -> ParallelLayout:
    """Return the layout to build for, with the parallel state running in it."""
    if not parallel_state.is_initialized():
        return groups.initialize(layout or ParallelLayout())
    install_cpu_platform()
    compat.repair_megatron_core()
    running = _running_sizes()
    if layout is None:
        return ParallelLayout(**running)
    wanted = {name: getattr(layout, name) for name in running} | {"etp": layout.expert_tensor_parallel_size}
    if wanted != running:
        raise ConfigError(f"this process runs the layout {running}, the model is asked for in {wanted}")
    return layout


def _running_sizes() -> dict[str, Any]:
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
    }
