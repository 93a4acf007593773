"""A recipe: everything that decides a training run, as frozen dataclasses that validate themselves.

Reading order: `Recipe` at the end holds the groups above it, which say what is learned, and those of
`recipe_execution.py`, which say how it is run. `overrides.py` changes fields from the command line and reads and writes
YAML. This module imports neither torch nor megatron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_qwen.errors import ConfigError
from megatron_qwen.model.config import CAPS
from megatron_qwen.training.recipe_execution import (
    CheckpointRecipe,
    LoggingRecipe,
    ParallelRecipe,
    PerformanceRecipe,
)
from megatron_qwen.training.recipe_group import RecipeGroup

DTYPES = ("bf16", "fp32")
BACKENDS = ("auto", "te", "local")
DECAY_STYLES = ("constant", "linear", "cosine", "wsd")
WSD_DECAY_STYLES = ("linear", "cosine", "exponential", "minus_sqrt")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(RecipeGroup):
    """What is trained.

    Attributes:
        source: preset name, `tiny`, `tiny-moe`, Hugging Face folder or Megatron checkpoint folder. The
            folders bring weights; the names start from random ones.
        seq_length: tokens per training sample.
        dtype: `bf16` (parameters in bfloat16, master weights and gradients in float32) or `fp32`.
        backend: layer implementation: `te` (Transformer Engine), `local`, or `auto`.
        attention_dropout, hidden_dropout: probabilities; None takes the model's own.
        dca_chunk_size, dca_local_size: Dual Chunk Attention with these sizes, in tokens; a local size of None is a
            sixteenth of the other. A chunk_size of 0 switches it off, None takes the model's own.
        dca_cap: largest position of a query: `released` (chunk_size) or `paper` (chunk_size - 1).
        dca_original_length: tokens from which logits grow with the square of the log-length temperature; 0 for never;
            None for the model's max_position_embeddings.
    """

    source: str = "tiny"
    seq_length: int = 128
    dtype: str = "bf16"
    backend: str = "auto"
    attention_dropout: float | None = None
    hidden_dropout: float | None = None
    dca_chunk_size: int | None = None
    dca_local_size: int | None = None
    dca_cap: str = "released"
    dca_original_length: int | None = None

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._at_least(1, "seq_length")
        yield from self._one_of("dtype", DTYPES)
        yield from self._one_of("backend", BACKENDS)
        for name in ("attention_dropout", "hidden_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                yield f"{name}: got {value}, expected 0 <= p < 1"
        yield from self._dual_chunk_problems()

    def _dual_chunk_problems(self) -> Iterator[str]:
        yield from self._at_least(0, "dca_chunk_size", "dca_local_size", "dca_original_length")
        yield from self._one_of("dca_cap", CAPS)
        chunk, local = self.dca_chunk_size, self.dca_local_size
        if not chunk and (local, self.dca_original_length) != (None, None):
            yield "dca_local_size, dca_original_length: set without dca_chunk_size; expected all of them or none"
        elif chunk and local is not None and local >= chunk:
            yield f"dca_local_size: got {local}, expected less than dca_chunk_size ({chunk})"


@dataclass(frozen=True, kw_only=True)
class DataRecipe(RecipeGroup):
    """What it is trained on.

    Attributes:
        blend: (weight, prefix of a .bin/.idx pair) for each corpus; weights need not sum to one.
        tokenizer: folder or file of the tokenizer; None takes the one of a model folder.
        split: shares of train, validation and test documents.
        cache_dir: folder of Megatron's index caches; None takes one inside the run folder.
        num_workers: processes that read samples ahead of each rank; 0 reads in the rank itself.
    """

    blend: tuple[tuple[float, str], ...] = ()
    tokenizer: str | None = None
    split: str = "98,2,0"
    cache_dir: str | None = None
    num_workers: int = 0

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._at_least(0, "num_workers")
        for weight, prefix in self.blend:
            if not weight > 0:
                yield f"blend: weight of {prefix} is {weight}, expected > 0"
        shares = self.split.split(",")
        if len(shares) != 3 or not all(_is_share(share) for share in shares) or float(shares[0]) <= 0:
            yield f"split: got {self.split!r}, expected three shares such as '98,2,0' with a first one > 0"


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) < math.inf
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class OptimizerRecipe(RecipeGroup):
    """AdamW as Megatron-Core runs it: no weight decay on biases and norms.

    Attributes:
        lr: peak learning rate.
        min_lr: rate at the end of the decay; None is a tenth of lr.
        beta1, beta2, eps: of Adam.
        weight_decay: decoupled weight decay.
        clip_grad: largest global gradient norm; 0 switches clipping off.
        distributed: shard optimizer state over data-parallel ranks (Megatron's distributed optimizer).
        max_bad_steps: consecutive steps with NaN or infinite loss or gradient until the run stops.
    """

    lr: float = 3e-4
    min_lr: float | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    distributed: bool = True
    max_bad_steps: int = 3

    @property
    def final_lr(self) -> float:
        """The rate at the end of the decay."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._at_least(0, "lr", "min_lr", "weight_decay", "clip_grad")
        yield from self._at_least(1, "max_bad_steps")
        if self.final_lr > self.lr:
            yield f"min_lr: got {self.min_lr}, expected at most lr ({self.lr})"
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                yield f"{name}: got {getattr(self, name)}, expected 0 <= beta < 1"
        if not self.eps > 0:
            yield f"eps: got {self.eps}, expected > 0"


@dataclass(frozen=True, kw_only=True)
class ScheduleRecipe(RecipeGroup):
    """How long, in which batches, and how the learning rate moves.

    Attributes:
        steps: optimizer steps of the whole run.
        micro_batch_size: samples per forward pass of one rank.
        global_batch_size: samples per optimizer step over all ranks.
        warmup_steps: steps of linear warm-up from 0; None is 5% of the run.
        style: `constant`, `linear`, `cosine` or `wsd` (warm-up, stable, decay).
        decay_steps: step at which the rate reaches its minimum; None is `steps`.
        wsd_decay_steps: length of the last phase of `wsd`; None is 10% of `decay_steps`.
        wsd_decay_style: shape of that phase.
    """

    steps: int = 100
    micro_batch_size: int = 1
    global_batch_size: int = 1
    warmup_steps: int | None = None
    style: str = "cosine"
    decay_steps: int | None = None
    wsd_decay_steps: int | None = None
    wsd_decay_style: str = "linear"

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return self.steps // 20 if self.warmup_steps is None else self.warmup_steps

    @property
    def decay(self) -> int:
        """Step at which the rate reaches its minimum."""
        return self.steps if self.decay_steps is None else self.decay_steps

    @property
    def wsd_decay(self) -> int:
        """Steps of the last phase of `wsd`."""
        return max(1, self.decay // 10) if self.wsd_decay_steps is None else self.wsd_decay_steps

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._at_least(1, "steps", "micro_batch_size", "global_batch_size", "decay_steps", "wsd_decay_steps")
        yield from self._at_least(0, "warmup_steps")
        yield from self._one_of("style", DECAY_STYLES)
        yield from self._one_of("wsd_decay_style", WSD_DECAY_STYLES)
        if self.micro_batch_size >= 1 and self.global_batch_size % self.micro_batch_size:
            yield (
                f"global_batch_size: got {self.global_batch_size}, expected a multiple of "
                f"micro_batch_size ({self.micro_batch_size})"
            )
        if self.warmup >= self.decay > 0:
            yield f"warmup_steps: got {self.warmup}, expected fewer than decay_steps ({self.decay})"
        if self.style == "wsd" and self.warmup + self.wsd_decay > self.decay:
            yield (
                f"wsd_decay_steps: got {self.wsd_decay}, expected at most {self.decay - self.warmup} "
                "(decay_steps less warmup_steps)"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe(RecipeGroup):
    """One training run. Equal recipes on an equal layout give equal bits.

    Attributes:
        out: run folder: checkpoints, metrics.jsonl, recipe.yaml, loss.png, summary.json.
        seed: of weights, dropout and data order.
    """

    out: str = "run"
    seed: int = 1234
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    performance: PerformanceRecipe = field(default_factory=PerformanceRecipe)
    logging: LoggingRecipe = field(default_factory=LoggingRecipe)

    def problems(self) -> Iterator[str]:  # noqa: D102
        yield from self._at_least(0, "seed")
        if not self.out:
            yield "out: empty, expected a folder"
        if self.checkpoint.optimizer_format == "dp_reshardable" and not self.optimizer.distributed:
            yield "checkpoint.optimizer_format: got dp_reshardable, which needs optimizer.distributed"

    def num_microbatches(self, dp: int) -> int:
        """Return the micro-batches each rank runs per step with `dp` data-parallel ranks.

        Raises:
            ConfigError: global_batch_size is not a multiple of micro_batch_size * dp.
        """
        batch, micro = self.schedule.global_batch_size, self.schedule.micro_batch_size
        if batch % (micro * dp):
            below = batch // (micro * dp) * micro * dp
            raise ConfigError(
                f"schedule.global_batch_size: got {batch}, expected a multiple of micro_batch_size {micro} x "
                f"data-parallel size {dp}; nearest are {below or micro * dp} and {below + micro * dp}"
            )
        return batch // (micro * dp)


GROUPS: dict[str, type[RecipeGroup]] = {
    "model": ModelRecipe,
    "data": DataRecipe,
    "parallel": ParallelRecipe,
    "optimizer": OptimizerRecipe,
    "schedule": ScheduleRecipe,
    "checkpoint": CheckpointRecipe,
    "performance": PerformanceRecipe,
    "logging": LoggingRecipe,
}


def group_values(group: RecipeGroup) -> dict[str, Any]:
    """Return the fields of a group by name."""
    return {each.name: getattr(group, each.name) for each in fields(group)}  # type: ignore[arg-type]
