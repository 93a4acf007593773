"""The groups of a recipe that say how a run is executed: on which ranks, how fast, what is kept of it and reported.

None of them changes what is learned, beyond rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from megatron_qwen.parallel.layout import CP_COMM_TYPES, ParallelLayout
from megatron_qwen.training.recipe_group import RecipeGroup

RECOMPUTE_MODES = ("none", "selective", "full")
RECOMPUTE_METHODS = ("uniform", "block")
OPTIMIZER_FORMATS = ("fully_reshardable", "dp_reshardable")


@dataclass(frozen=True, kw_only=True)
class ParallelRecipe(RecipeGroup):
    """How it is spread over ranks; the fields are `ParallelLayout`'s."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int | None = None
    cp: int = 1
    dp: int | None = None
    sequence_parallel: bool = False
    pp_layout: tuple[int, ...] | None = None

    def layout(self) -> ParallelLayout:
        """Return the layout these fields describe."""
        return ParallelLayout(**{each.name: getattr(self, each.name) for each in fields(self)})

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._at_least(1, "tp", "pp", "vpp", "ep", "etp", "cp", "dp")


@dataclass(frozen=True, kw_only=True)
class PerformanceRecipe(RecipeGroup):
    """Switches of Megatron-Core that change speed or memory; handed through after a check, never dropped.

    Attributes:
        recompute: `none`, `selective` (of `recompute_modules`) or `full` (whole layers).
        recompute_modules: module names of selective recompute; empty takes Megatron's `core_attn`.
        recompute_method, recompute_num_layers: of full recompute.
        cp_comm_type: how context-parallel ranks come by the keys: `p2p` (a ring) or `all_gather`.
        overlap_grad_reduce: reduce gradients while backward runs.
        overlap_param_gather: gather the distributed optimizer's parameters while forward runs.
        align_param_gather: start the gathers of all pipeline stages together.
        overlap_p2p_comm: overlap pipeline sends with compute; None is on exactly for interleaved pipelines.
        grad_reduce_in_fp32, bucket_size, pad_buckets_for_high_nccl_busbw: of Megatron's DDP.
        overlap_param_gather_with_optimizer_step, precision_aware_optimizer, optimizer_cpu_offload,
            optimizer_offload_fraction: of its optimizer.
        tp_comm_overlap, fp8, fp8_recipe, fp8_param_gather: through Transformer Engine.
        cuda_graphs: capture layers as CUDA graphs.
        moe_grouped_gemm, moe_token_dispatcher, moe_shared_expert_overlap, moe_permute_fusion: of MoE layers.
        gradient_accumulation_fusion: add weight gradients inside the GEMM; on a GPU it needs apex or Transformer
            Engine. None: on a CPU only.
        defer_embedding_wgrad_compute: of the last pipeline stage.
        fuse_linear_cross_entropy: compute the loss without holding logits. None: in bf16 on a CPU, where it is also
            faster, unless a switch that needs them is on.
    """

    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ()
    recompute_method: str = "uniform"
    recompute_num_layers: int = 1
    cp_comm_type: str = "p2p"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    align_param_gather: bool = False
    overlap_p2p_comm: bool | None = None
    grad_reduce_in_fp32: bool = True
    bucket_size: int | None = None
    pad_buckets_for_high_nccl_busbw: bool = False
    overlap_param_gather_with_optimizer_step: bool = False
    precision_aware_optimizer: bool = False
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float = 1.0
    tp_comm_overlap: bool = False
    fp8: str | None = None
    fp8_recipe: str = "tensorwise"
    fp8_param_gather: bool = False
    cuda_graphs: bool = False
    moe_grouped_gemm: bool | None = None
    moe_token_dispatcher: str | None = None
    moe_shared_expert_overlap: bool = False
    moe_permute_fusion: bool = False
    gradient_accumulation_fusion: bool | None = None
    defer_embedding_wgrad_compute: bool = False
    fuse_linear_cross_entropy: bool | None = None

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._one_of("recompute", RECOMPUTE_MODES)
        yield from self._one_of("recompute_method", RECOMPUTE_METHODS)
        yield from self._one_of("cp_comm_type", CP_COMM_TYPES)
        yield from self._at_least(1, "recompute_num_layers", "bucket_size")
        if self.recompute_modules and self.recompute != "selective":
            yield f"recompute_modules: set, but recompute is {self.recompute!r}; expected 'selective'"
        if self.fp8 not in (None, "e4m3", "hybrid"):
            yield f"fp8: got {self.fp8!r}, expected e4m3, hybrid or null"
        if not 0.0 <= self.optimizer_offload_fraction <= 1.0:
            yield f"optimizer_offload_fraction: got {self.optimizer_offload_fraction}, expected 0 to 1"


@dataclass(frozen=True, kw_only=True)
class CheckpointRecipe(RecipeGroup):
    """What is kept of the run.

    Attributes:
        save_every: steps between checkpoints; None saves at the end only.
        save_at_end: also save when the run ends or is interrupted; off for measurements.
        keep_last: number of checkpoints that stay; None keeps all.
        optimizer_format: of the distributed optimizer's state: `fully_reshardable` loads and converts to any layout;
            `dp_reshardable` loads at another data-parallel size only, and is not gathered for each save.
    """

    save_every: int | None = None
    save_at_end: bool = True
    keep_last: int | None = None
    optimizer_format: str = "fully_reshardable"

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._at_least(1, "save_every", "keep_last")
        yield from self._one_of("optimizer_format", OPTIMIZER_FORMATS)


@dataclass(frozen=True, kw_only=True)
class LoggingRecipe(RecipeGroup):
    """What is reported, and how often.

    Attributes:
        log_every: steps between progress lines; metrics.jsonl has every step.
        eval_every: steps between validation losses; None never validates.
        eval_batches: global batches of one validation.
        tensorboard: write event files; None writes them where tensorboard is installed.
    """

    log_every: int = 1
    eval_every: int | None = None
    eval_batches: int = 4
    tensorboard: bool | None = None

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._at_least(1, "log_every", "eval_every", "eval_batches")
