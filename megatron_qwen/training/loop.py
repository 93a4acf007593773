"""`train(recipe)`: from a recipe to a trained, checkpointed, reported run. Reads top to bottom."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_qwen.checkpoint import state
from megatron_qwen.checkpoint.atomic import atomic_write_text
from megatron_qwen.checkpoint.store import CheckpointStore
from megatron_qwen.errors import NumericsError
from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout
from megatron_qwen.signals import StopRequest
from megatron_qwen.training.batches import step_batches
from megatron_qwen.training.identity import run_identity
from megatron_qwen.training.metrics import METRICS_NAME, MetricsLog, Peak, StepMetrics, device_peak, read_metrics
from megatron_qwen.training.overrides import dump_recipe, recipe_to_dict
from megatron_qwen.training.plots import PLOT_NAME, plot_loss
from megatron_qwen.training.rank import (
    TORCH_DTYPES,
    TrainingRank,
    build_rank,
    check_recipe,
    world_size_of_environment,
)
from megatron_qwen.training.recipe import Recipe
from megatron_qwen.training.schedule import set_step
from megatron_qwen.training.source import ModelSource, resolve_source, write_hf_folder
from megatron_qwen.training.step import StepResult
from megatron_qwen.training.summary import TrainSummary, peak_memory_bytes

logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.yaml"
SUMMARY_NAME = "summary.json"


def train(
    recipe: Recipe,
    *,
    resume: bool = True,
    allow_changed: Iterable[str] = (),
    stop_at: int | None = None,
    allow_pickle: bool = False,
    echo: Callable[[str], None] = lambda line: None,
) -> TrainSummary:
    """Run a recipe to its end, or to the next interruption. Collective: every rank calls it.

    The run folder `recipe.out` receives checkpoints (`iter_*`), `hf/`, metrics.jsonl, loss.png, recipe.yaml and
    summary.json. SIGTERM and Ctrl-C save a checkpoint after the present step and return.

    Args:
        recipe: what to run.
        resume: go on from the newest verified checkpoint of the run folder, if there is one.
        allow_changed: parts of the run's identity that may differ from the checkpoint's.
        stop_at: save and return after this step, as an interruption would; for jobs with a time limit.
        allow_pickle: start from weights that are pickles (per-rank folders, pytorch_model.bin), as plain data.
        echo: receives progress lines, on rank 0.

    Raises:
        UnsafeInputError: the weights to start from are pickles and `allow_pickle` is not set.
        ConfigError: the recipe cannot run here.
        InputError: model, data or checkpoint cannot be used; MismatchError if the checkpoint is of another run.
        StorageError: the run folder is in use by another run, or cannot be written.
        NumericsError: too many steps in a row with NaN or infinity.
        RankFailure: another rank died or stopped answering.
    """
    source = resolve_source(recipe, allow_pickle=allow_pickle)
    check_recipe(recipe, source.config, world_size_of_environment())
    identity = run_identity(recipe, source)
    layout = groups.initialize(recipe.parallel.layout(), seed=recipe.seed)
    store = CheckpointStore(Path(recipe.out), keep_last=recipe.checkpoint.keep_last)
    with store.lock(), StopRequest() as stop_request, groups.collectives():
        run = Run(recipe, source, layout, store, identity, echo)
        run.start(resume=resume, allow_changed=allow_changed)
        return run.run(stop_request, stop_at)


@dataclass
class Progress:
    """What a resume needs to know beside tensors; saved with each checkpoint."""

    tokens: int = 0
    skipped_steps: int = 0
    bad_steps_in_a_row: int = 0


@dataclass
class _Totals:
    """Of this call, without its first step, which pays for warm-up."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Run:
    """One call of `train` on one rank."""

    recipe: Recipe
    source: ModelSource
    layout: ParallelLayout
    store: CheckpointStore
    identity: Mapping[str, Any]
    echo: Callable[[str], None]
    progress: Progress = field(default_factory=Progress)
    step: int = 0
    resumed_from: int | None = None
    saved_step: int | None = None
    valid_loss: float | None = None
    totals: _Totals = field(default_factory=_Totals)

    def start(self, *, resume: bool, allow_changed: Iterable[str]) -> None:
        """Build this rank's parts, from the newest checkpoint if there is one to go on from."""
        latest = self.store.latest_valid()
        will_resume = resume and latest is not None
        if latest is not None and not resume and groups.is_rank_zero():
            logger.warning(
                "%s has a checkpoint of step %d; starting over at step 0 as asked", self.store.root, latest[0]
            )
        self.rank: TrainingRank = build_rank(self.recipe, self.source, self.layout, load_weights=not will_resume)
        self.train_data, self.valid_data = self._build_datasets()
        self.record = state.run_record(identity=self.identity, layout=self.layout)
        self.record["performance"] = recipe_to_dict(self.recipe.performance)
        if will_resume:
            self._resume(allow_changed)
        self.peak = _share_peak(device_peak(TORCH_DTYPES[self.recipe.model.dtype]))
        if groups.is_rank_zero():
            self._open_files()

    def run(self, stop_request: StopRequest, stop_at: int | None) -> TrainSummary:
        """Run the remaining steps; save, validate and report when due."""
        schedule, checkpoint, logging_ = self.recipe.schedule, self.recipe.checkpoint, self.recipe.logging
        batches = step_batches(
            self.train_data,
            self.rank.plan,
            first_step=self.step,
            last_step=schedule.steps,
            num_workers=self.recipe.data.num_workers,
        )
        is_stopping = False
        while self.step < schedule.steps and not is_stopping:
            metrics, is_stopping = self._train_step(batches, stop_request)
            is_stopping = is_stopping or self.step == stop_at
            is_last = is_stopping or self.step == schedule.steps
            if logging_.eval_every and (self.step % logging_.eval_every == 0 or self.step == schedule.steps):
                self.valid_loss = metrics["valid_loss"] = self._validate()
            self._log(StepMetrics(**metrics))
            if (is_last and checkpoint.save_at_end) or (
                checkpoint.save_every and self.step % checkpoint.save_every == 0
            ):
                self._save()
        return self._finish(is_interrupted=self.step < schedule.steps)

    def _train_step(
        self, batches: Iterator[list[dict[str, Any]]], stop_request: StopRequest
    ) -> tuple[dict[str, Any], bool]:
        start = time.perf_counter()
        lr = set_step(self.rank.scheduler, self.step + 1)
        result = self.rank.step.train(next(batches), is_stop_requested=stop_request.is_set)
        seconds = time.perf_counter() - start
        self.step += 1
        self.progress.tokens += result.num_tokens
        if self.step - 1 > (self.resumed_from or 0):
            self.totals.steps += 1
            self.totals.tokens += result.num_tokens
            self.totals.seconds += seconds
        self._judge(result)
        tokens_per_second = result.num_tokens / seconds
        metrics = {
            "step": self.step,
            "samples": self.step * self.recipe.schedule.global_batch_size,
            "tokens": self.progress.tokens,
            "loss": result.loss,
            "aux_loss": result.aux_loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "is_applied": result.is_applied,
            "seconds": seconds,
            "tokens_per_second": tokens_per_second,
            "tflops": self._tflops(tokens_per_second),
            "mfu": self._tflops(tokens_per_second) / self.peak.tflops,
        }
        return metrics, result.is_stop_requested

    def _judge(self, result: StepResult) -> None:
        """Count steps that were not applied; too many in a row end the run, on every rank alike."""
        if result.is_applied:
            self.progress.bad_steps_in_a_row = 0
            return
        self.progress.skipped_steps += 1
        self.progress.bad_steps_in_a_row += 1
        batch = self.recipe.schedule.global_batch_size
        where = (
            f"step {self.step}: loss {result.loss}, gradient norm {result.grad_norm}; samples "
            f"{(self.step - 1) * batch} to {self.step * batch - 1} of the training blend with seed {self.recipe.seed}"
        )
        if groups.is_rank_zero():
            logger.warning("%s. The weights stay as they were", where)
        if self.progress.bad_steps_in_a_row >= self.recipe.optimizer.max_bad_steps:
            raise NumericsError(
                f"{where}. {self.progress.bad_steps_in_a_row} steps in a row were not finite "
                "(optimizer.max_bad_steps). Look at these samples, lower optimizer.lr, or resume from "
                f"{'step ' + str(self.saved_step) if self.saved_step else 'an earlier checkpoint'}"
            )

    def _tflops(self, tokens_per_second: float) -> float:
        from megatron_qwen.model.flops import train_flops_per_token

        flops = train_flops_per_token(self.source.config, self.recipe.model.seq_length, causal=True)
        return tokens_per_second * float(flops) / groups.world_size() / 1e12

    def _log(self, metrics: StepMetrics) -> None:
        if groups.is_rank_zero():
            self.log.write(metrics)

    def _validate(self) -> float:
        """Return the loss over the first `eval_batches` global batches of the validation split, the same each time."""
        self.rank.set_forward_hooks(is_on=False)
        count = self.recipe.logging.eval_batches
        batches = step_batches(self.valid_data, self.rank.plan, first_step=0, last_step=count)
        loss = self.rank.step.evaluate(list(batches))
        self.rank.set_forward_hooks(is_on=True)
        return loss

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        self.rank.set_forward_hooks(is_on=False)
        state.save(
            self.store,
            self.step,
            self.record,
            vars(self.progress),
            self.rank.models,
            self.rank.optimizer,
            self.rank.scheduler,
            files={RECIPE_NAME: dump_recipe(self.recipe)},
            optimizer_format=self.recipe.checkpoint.optimizer_format,
        )
        self.rank.set_forward_hooks(is_on=True)
        self.saved_step = self.step
        if groups.is_rank_zero():
            self.echo(f"saved checkpoint of step {self.step} to {self.store.step_folder(self.step)}")
            self._plot()

    def _resume(self, allow_changed: Iterable[str]) -> None:
        resumed = state.resume(
            self.store,
            self.record,
            self.rank.models,
            self.rank.optimizer,
            self.rank.scheduler,
            seed=self.recipe.seed,
            allow_changed=allow_changed,
        )
        assert resumed is not None, self.store.root
        self.step = self.resumed_from = self.saved_step = resumed.step
        self.progress = Progress(**resumed.progress)
        if groups.is_rank_zero():
            if self.store.common(resumed.step).get("performance") != self.record["performance"]:
                logger.warning(
                    "performance switches changed since step %d: the next steps may differ in rounding", self.step
                )
            self.echo(f"resumed from step {self.step}: {resumed.folder}")
            for reason in resumed.not_exact:
                self.echo(f"not bit-exact: {reason}")

    def _build_datasets(self) -> tuple[Any, Any]:
        from megatron_qwen.data.blend import build_datasets

        recipe = self.recipe
        batch = recipe.schedule.global_batch_size
        valid = recipe.logging.eval_batches * batch if recipe.logging.eval_every else 0
        train_data, valid_data, _ = build_datasets(
            recipe.data.blend,
            seq_length=recipe.model.seq_length,
            seed=recipe.seed,
            split=recipe.data.split,
            num_samples=(recipe.schedule.steps * batch, valid, 0),
            tokenizer=self.source.tokenizer,
            cache_dir=Path(recipe.data.cache_dir or Path(recipe.out) / "cache"),
        )
        return train_data, valid_data

    def _open_files(self) -> None:
        """Make what rank 0 alone writes: hf/, recipe.yaml, and the log."""
        folder = self.store.root
        write_hf_folder(self.source, folder)
        atomic_write_text(folder / RECIPE_NAME, dump_recipe(self.recipe))
        self.log = MetricsLog(
            folder,
            first_step=self.step,
            steps=self.recipe.schedule.steps,
            log_every=self.recipe.logging.log_every,
            tensorboard=self.recipe.logging.tensorboard,
            echo=self.echo,
        )
        config = self.source.config
        self.echo(
            f"{self.recipe.model.source}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, vocabulary "
            f"{config.vocab_size:,}; {groups.world_size()} ranks, {self.layout}; "
            f"peak {self.peak.tflops:.3g} TFLOP/s per rank ({self.peak.source})"
        )

    def _plot(self) -> None:
        plot_loss(
            self.store.root / METRICS_NAME,
            self.store.root / PLOT_NAME,
            unigram_entropy=self._unigram_entropy(),
            title=f"{self.recipe.model.source}, {self.progress.tokens:,} tokens",
        )

    def _unigram_entropy(self) -> float | None:
        """Return the entropy of a single small corpus; None for blends and for data too large to count on the way."""
        from megatron_qwen.data.blend import unigram_entropy

        if not hasattr(self, "_entropy"):
            blend = self.recipe.data.blend
            size = Path(f"{blend[0][1]}.bin").stat().st_size
            self._entropy = unigram_entropy(blend[0][1]) if len(blend) == 1 and size < 1 << 28 else None
        return self._entropy

    def _finish(self, *, is_interrupted: bool) -> TrainSummary:
        summary: list[TrainSummary | None] = [None]
        if groups.is_rank_zero():
            self.log.close()
            if self.saved_step != self.step:
                self._plot()
            summary = [self._summarize(is_interrupted)]
            assert summary[0] is not None
            text = json.dumps(summary[0].to_dict(), indent=2) + "\n"
            atomic_write_text(self.store.root / SUMMARY_NAME, text)
        dist.broadcast_object_list(summary, src=0)
        assert summary[0] is not None
        return summary[0]

    def _summarize(self, is_interrupted: bool) -> TrainSummary:
        root = self.store.root
        steps = read_metrics(root / METRICS_NAME)
        tokens_per_second = self.totals.tokens / self.totals.seconds if self.totals.seconds else math.nan
        return TrainSummary(
            steps=self.step,
            resumed_from=self.resumed_from,
            interrupted=is_interrupted,
            first_loss=steps[0]["loss"] if steps else math.nan,
            last_loss=steps[-1]["loss"] if steps else math.nan,
            valid_loss=next((each["valid_loss"] for each in reversed(steps) if "valid_loss" in each), None),
            skipped_steps=self.progress.skipped_steps,
            tokens=self.progress.tokens,
            tokens_per_second=tokens_per_second,
            tflops=self._tflops(tokens_per_second),
            mfu=self._tflops(tokens_per_second) / self.peak.tflops,
            peak_memory_bytes=peak_memory_bytes(),
            peak=self.peak.source,
            world_size=groups.world_size(),
            checkpoint=None if self.saved_step is None else str(self.store.step_folder(self.saved_step)),
            metrics=str(root / METRICS_NAME),
            loss_curve=str(root / PLOT_NAME) if (root / PLOT_NAME).exists() else None,
            recipe=str(root / RECIPE_NAME),
        )


def _share_peak(mine: Peak) -> Peak:
    """Return the mean peak over ranks, so that MFU is of the whole job."""
    peaks: list[Any] = [None] * groups.world_size()
    dist.all_gather_object(peaks, mine.tflops)
    return Peak(sum(peaks) / len(peaks), mine.source)
