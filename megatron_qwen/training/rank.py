"""Everything one rank holds for training: checked, built, and wired together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_qwen import compat
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.parallel.layout import ParallelLayout, check_layout
from megatron_qwen.training.batches import BatchPlan
from megatron_qwen.training.performance import check_performance, overlaps_p2p, transformer_overrides
from megatron_qwen.training.recipe import Recipe
from megatron_qwen.training.source import ModelSource

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from megatron_qwen.training.step import TrainStep

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class TrainingRank:
    """The parts of this rank."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    step: TrainStep
    plan: BatchPlan

    @property
    def models(self) -> list[GPTModel]:
        """The chunks without their DDP wrappers, whose prefix must not reach the names in a checkpoint."""
        return [chunk.module for chunk in self.chunks]

    def set_forward_hooks(self, *, is_on: bool) -> None:
        """Switch the hooks of overlap_param_gather; off also brings every parameter up to date."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:
                chunk.enable_forward_pre_hook() if is_on else chunk.disable_forward_pre_hook()


def check_recipe(recipe: Recipe, config: QwenConfig, world_size: int) -> None:
    """Refuse a recipe that cannot run, before any group, file or weight is touched.

    Raises:
        ConfigError: layout, batch, sequence or switches do not fit the model, the ranks or this machine.
    """
    if not recipe.data.blend:
        raise ConfigError("data.blend: empty; give at least one prefix of a .bin/.idx pair with --data")
    check_layout(
        recipe.parallel.layout(),
        config.shape(),
        world_size=world_size,
        seq_length=recipe.model.seq_length,
        micro_batch_size=recipe.schedule.micro_batch_size,
        global_batch_size=recipe.schedule.global_batch_size,
        overlap_p2p=overlaps_p2p(recipe),
    )
    _check_attention(recipe, config)
    check_performance(recipe, config)


def _check_attention(recipe: Recipe, config: QwenConfig) -> None:
    """Refuse lengths and switches that the attention of this run does not have."""
    from megatron_qwen.model.dual_chunk import DualChunk
    from megatron_qwen.model.transformer_config import transformer_engine_by_default

    length, dual = recipe.model.seq_length, DualChunk.of(config)
    if length > config.max_position_embeddings and dual is None:
        raise ConfigError(
            f"model.seq_length: got {length}, but the model has max_position_embeddings "
            f"{config.max_position_embeddings}; expected at most that, or Dual Chunk Attention (model.dca_chunk_size)"
        )
    is_chunked = dual is not None and dual.is_active(length)
    backend = recipe.model.backend
    is_local = backend == "local" or (backend == "auto" and not transformer_engine_by_default())
    if is_chunked and not is_local:
        raise ConfigError(
            f"model.backend: got {backend!r}; Transformer Engine has no Dual Chunk Attention, which this model uses "
            f"for {length} tokens; expected 'local', or model.dca_chunk_size=0 for plain attention"
        )
    dropout = recipe.model.attention_dropout
    dropout = config.attention_dropout if dropout is None else dropout
    if dropout and (is_chunked or (is_local and recipe.parallel.cp > 1)):
        what = "Dual Chunk Attention" if is_chunked else "parallel.cp > 1"
        raise ConfigError(f"model.attention_dropout: got {dropout}; expected 0 with {what}")
    yarn, cp = config.rope_scaling, recipe.parallel.cp
    if yarn is not None and cp > 1 and yarn.original_max_position_embeddings % (2 * cp):
        raise ConfigError(
            f"parallel.cp: got {cp}; expected 2 * cp to divide original_max_position_embeddings "
            f"{yarn.original_max_position_embeddings} of this model's YaRN, of which Megatron-Core cuts a table"
        )


def world_size_of_environment() -> int:
    """Return the number of ranks torchrun announced, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def build_rank(recipe: Recipe, source: ModelSource, layout: ParallelLayout, *, load_weights: bool) -> TrainingRank:
    """Build model, DDP, optimizer and schedule of this rank. Collective; groups must be initialized.

    Args:
        recipe: checked by `check_recipe`.
        source: of the model.
        layout: with dp filled in.
        load_weights: start from the source's weights if it has some (a resume brings its own).

    Raises:
        ConfigError: Megatron-Core refuses the combination of fields.
    """
    from megatron.core import parallel_state

    from megatron_qwen.model.build import build_model_chunks
    from megatron_qwen.training.optim import build_optimizer, wrap_chunks
    from megatron_qwen.training.schedule import build_scheduler
    from megatron_qwen.training.step import TrainStep

    overrides = _overrides(recipe, source.config, layout)
    overrides["fuse_linear_cross_entropy"] = recipe.performance.fuse_linear_cross_entropy
    dtype = TORCH_DTYPES[recipe.model.dtype]
    models = build_model_chunks(source.config, layout, dtype=dtype, backend=recipe.model.backend, **overrides)
    if source.weights is not None and load_weights:
        from megatron_qwen.conversion.loading import load_weights_into

        load_weights_into(models, source.weights, source.config, allow_pickle=source.allow_pickle)
    chunks = wrap_chunks(recipe, models)
    for chunk in chunks:
        chunk.broadcast_params()
        chunk.train()
    optimizer = build_optimizer(recipe, chunks)
    plan = BatchPlan(
        global_batch_size=recipe.schedule.global_batch_size,
        micro_batch_size=recipe.schedule.micro_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
    )
    step = TrainStep(
        source.config,
        chunks,
        optimizer,
        seq_length=recipe.model.seq_length,
        micro_batch_size=plan.micro_batch_size,
        num_microbatches=plan.num_microbatches,
    )
    return TrainingRank(chunks, optimizer, build_scheduler(recipe, optimizer), step, plan)


def _overrides(recipe: Recipe, config: QwenConfig, layout: ParallelLayout) -> dict[str, Any]:
    overrides = transformer_overrides(recipe, config)
    if config.is_moe and config.router_aux_loss_coef:
        megatron = config.to_transformer_config(layout).moe_aux_loss_coeff
        overrides["moe_aux_loss_coeff"] = megatron * compat.aux_loss_gradient_factor(layout.tp, layout.cp)
    return overrides
