"""Stock Megatron-Core models, of ours only the configuration; what their weights are, and where a rank saves them."""

from __future__ import annotations

from typing import Any

import torch

from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.testing.ranks import leave_layout


def enter(layout: ParallelLayout) -> None:
    """Change the layout and keep the process group: a second one cannot be formed over the same store."""
    from megatron_qwen.parallel import groups

    if torch.distributed.is_initialized():
        if groups._active == layout.resolve(torch.distributed.get_world_size()):
            return  # dozens of gloo groups are slow to form
        leave_layout()
    groups.initialize(layout)


def stock_chunks(
    config: QwenConfig, layout: ParallelLayout, *, dtype: torch.dtype | None = None, transformer_impl: str = "local"
) -> list[Any]:
    """Return this rank's chunks of Megatron's GPTModel with Megatron's own layer specification.

    Args:
        config: the model.
        layout: entered before.
        dtype: of the parameters; None takes the model's.
        transformer_impl: "local" or "transformer_engine".
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    dtype = dtype or getattr(torch, config.torch_dtype)
    transformer_config = config.to_transformer_config(layout, dtype=dtype, transformer_impl=transformer_impl)
    chunks = []
    for stage in range(layout.vpp) if layout.vpp > 1 else [None]:
        place = {"ignore_virtual": False, "vp_stage": stage}
        spec = get_gpt_decoder_block_spec(
            transformer_config,
            use_transformer_engine=transformer_impl == "transformer_engine",
            normalization="RMSNorm",
            vp_stage=stage,
        )
        model = GPTModel(
            transformer_config,
            spec,
            vocab_size=-(-config.vocab_size // layout.tp) * layout.tp,
            max_sequence_length=64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=config.tie_word_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=stage,
        )
        chunks.append(model.to(dtype))
    return chunks


def rank_folder() -> str:
    """The name that Megatron-LM's get_checkpoint_name gives."""
    from megatron.core import parallel_state as state

    name = f"mp_rank_{state.get_tensor_model_parallel_rank():02d}"
    if state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{state.get_pipeline_model_parallel_rank():03d}"
    if state.get_expert_model_parallel_world_size() > 1:
        name += f"_{state.get_expert_model_parallel_rank():03d}"
    return name


def snapshot(chunks: list[Any]) -> dict[str, torch.Tensor]:
    return {
        f"{i} {name}": parameter.detach().clone()
        for i, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


def poison(chunks: list[Any]) -> None:
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two snapshots are equal to the last bit."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
