"""The conversions themselves: plan, prove, build aside, take the final name in one rename.

import_hf("Qwen2.5-0.5B", "megatron")        # Hugging Face -> Megatron torch_dist
export_hf("megatron", "hf")                  # and back, bit for bit
plan = prepare_import("Qwen2.5-72B", "mg")   # the proof alone: no weight is read, nothing is written
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.store import RELEASE
from megatron_qwen.conversion.engine.numerics import CheckedWeights
from megatron_qwen.conversion.engine.progress import progress_bar
from megatron_qwen.conversion.engine.staging import Staging, finish, is_finished, staged
from megatron_qwen.conversion.engine.target import check_disk, check_target, existing_parent, fingerprint_of, follow
from megatron_qwen.conversion.engine.verification import verify_output
from megatron_qwen.conversion.engine.write import check_memory, default_threads, peak_memory, write_output
from megatron_qwen.conversion.formats.hf.source import HfFolder
from megatron_qwen.conversion.interfaces import OutputFile, WeightSource
from megatron_qwen.conversion.loading import Source, open_source
from megatron_qwen.conversion.optimizer.verification import verify_optimizer
from megatron_qwen.conversion.options import ConversionOptions
from megatron_qwen.conversion.outputs import hf_files, megatron_files
from megatron_qwen.conversion.parameters import tied_output
from megatron_qwen.conversion.plan import ConversionPlan
from megatron_qwen.conversion.report import ConversionReport, DryRun, FileSize, expected_seconds
from megatron_qwen.conversion.resharding import reshard_files
from megatron_qwen.errors import Interrupted, MismatchError, QwenError
from megatron_qwen.model.config import QwenConfig
from megatron_qwen.signals import StopRequest

logger = logging.getLogger(__name__)

_SCAN_ROWS = 4096
_T = TypeVar("_T")


@dataclass(frozen=True)
class Verb:
    """A kind of conversion.

    Attributes:
        direction: for messages; part of what a resumed conversion must agree in.
        reads_hf: the source is a Hugging Face folder, else a Megatron checkpoint.
        files: gives the files of the target.
    """

    direction: str
    reads_hf: bool
    files: Callable[[WeightSource, ConversionPlan, CheckedWeights, ConversionOptions], list[OutputFile]]


IMPORT = Verb("hf -> megatron", True, megatron_files)
EXPORT = Verb("megatron -> hf", False, hf_files)
RESHARD = Verb("megatron -> megatron", False, reshard_files)


def import_hf(hf_dir: str | Path, out_dir: str | Path, **options: Any) -> ConversionReport:
    """Convert a Hugging Face folder to a Megatron checkpoint of weights, `out_dir/release`.

    Args:
        hf_dir: config.json and safetensors.
        out_dir: made in one rename when everything is written; `hf/` in it carries config and tokenizer.
        options: fields of `ConversionOptions`.

    Raises:
        MismatchError, ConfigError, CorruptInputError, IncompleteInputError, UnsafeInputError: the input.
        NumericsError: NaN, infinity, or overflow in `dtype`.
        StorageError: disk full, or the target is in the way.
        Interrupted: SIGINT or SIGTERM; `resume=True` goes on.
    """
    return prepare_import(hf_dir, out_dir, **options).run()


def export_hf(
    megatron_dir: str | Path,
    out_dir: str | Path,
    *,
    step: int | None = None,
    config: QwenConfig | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert the weights of a Megatron checkpoint to a Hugging Face folder; raises as `import_hf`.

    Optimizer state and the like are passed over, with one logged line.

    Args:
        megatron_dir: an import, a training run, or one step's folder.
        out_dir: made in one rename when everything is written.
        step: the step of a run; None takes what the tracker names.
        config: QwenConfig of the model, for a checkpoint without `hf/config.json`.
        options: fields of `ConversionOptions`.
    """
    return prepare_export(megatron_dir, out_dir, step=step, config=config, **options).run()


def reshard(
    in_dir: str | Path,
    out_dir: str | Path,
    *,
    step: int | None = None,
    config: QwenConfig | None = None,
    **options: Any,
) -> ConversionReport:
    """Convert a Megatron checkpoint to another Megatron format or layout; arguments and errors as `export_hf`."""
    return prepare_reshard(in_dir, out_dir, step=step, config=config, **options).run()


def prepare_import(hf_dir: str | Path, out_dir: str | Path, **options: Any) -> Conversion:
    """Prove from headers that `import_hf` can do its work, and return it ready to run."""
    return _prepare_folder(IMPORT, hf_dir, out_dir, options)


def prepare_export(
    megatron_dir: str | Path,
    out_dir: str | Path,
    *,
    step: int | None = None,
    config: QwenConfig | None = None,
    **options: Any,
) -> Conversion:
    """Prove from headers that `export_hf` can do its work, and return it ready to run."""
    return _prepare_folder(EXPORT, megatron_dir, out_dir, options, step=step, config=config)


def prepare_reshard(
    in_dir: str | Path,
    out_dir: str | Path,
    *,
    step: int | None = None,
    config: QwenConfig | None = None,
    **options: Any,
) -> Conversion:
    """Prove from headers that `reshard` can do its work, and return it ready to run."""
    return _prepare_folder(RESHARD, in_dir, out_dir, options, step=step, config=config)


def _prepare_folder(
    verb: Verb, folder: str | Path, out_dir: str | Path, options: Mapping[str, Any], **choice: Any
) -> Conversion:
    chosen, target = ConversionOptions(**options), Path(out_dir)
    return prepare(verb, _open(verb, Path(folder), target, chosen, **choice), target, chosen)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that is proved and not begun.

    Attributes:
        verb: its kind.
        source: its weights.
        target: the folder to be made.
        plan: every parameter.
        weights: the source, checked and cast.
        files: of the target, the manifest excepted.
        options: as asked for.
        fingerprint: decides every byte of the output.
        started: `time.monotonic()` before the first header was read.
    """

    verb: Verb
    source: WeightSource
    target: Path
    plan: ConversionPlan
    weights: CheckedWeights
    files: tuple[OutputFile, ...]
    options: ConversionOptions
    fingerprint: Mapping[str, Any]
    started: float = field(default_factory=time.monotonic)

    @property
    def manifest_name(self) -> str:
        """Where the manifest lies in the target."""
        folders = {file.name.partition("/")[0] for file in self.files}
        steps = [folder for folder in folders if folder == RELEASE or folder.startswith("iter_")]
        return f"{steps[0]}/{manifest.MANIFEST_NAME}" if steps else manifest.MANIFEST_NAME

    @property
    def num_tensors(self) -> int:
        """Hugging Face tensors that are converted."""
        return sum(len(item.parameter.hf_names) for item in self.plan.parameters)

    @property
    def threads(self) -> int:
        """Writer threads."""
        return self.options.threads or default_threads()

    def dry_run(self) -> DryRun:
        """Return what `run` would do; measures the rate of disk and processor for a moment."""
        total = sum(file.num_bytes for file in self.files)
        return DryRun(
            **self._subject(self.plan.notes),
            files=tuple(FileSize(file.name, file.num_bytes) for file in self.files),
            total_bytes=total,
            free_bytes=shutil.disk_usage(existing_parent(self.target)).free,
            peak_memory_bytes=peak_memory(self.files, self.threads, self.options.max_memory),
            expected_seconds=expected_seconds(total, existing_parent(self.target)),
        )

    def run(self) -> ConversionReport:
        """Convert; raises as `import_hf`."""
        if self.options.resume and is_finished(self.target, self.fingerprint, self.manifest_name):
            note = f"{self.target} was finished already; what was left beside it is deleted"
            return self._report(verify_seconds=0.0, reused=len(self.files), notes=[note])
        inputs = (self.source.path, *self.source.side_folders())
        check_target(self.target, overwrite=self.options.overwrite, inputs=inputs)
        if self.plan.has_equal_output:
            self._require_equal_output()
        with StopRequest() as stop, staged(self.target, self.fingerprint, resume=self.options.resume) as staging:
            try:
                return self._write(staging, lambda: stop.is_set)
            except (Interrupted, KeyboardInterrupt):
                raise Interrupted(
                    f"{self.target}: stopped by a signal; the finished files are kept in {staging.path.name}, and "
                    "--resume goes on with them"
                ) from None

    def _write(self, staging: Staging, is_stopped: Callable[[], bool]) -> ConversionReport:
        total = sum(piece.num_bytes for file in self.files for piece in file.pieces)
        with progress_bar(self.verb.direction, self.num_tensors, total, is_shown=self.options.progress) as advance:
            write_output(
                self.files,
                staging.output,
                threads=self.threads,
                max_memory=self.options.max_memory,
                advance=advance,
                journal=staging.journal,
                is_stopped=is_stopped,
            )
        verify_seconds = 0.0
        if self.options.verify:
            began = time.monotonic()
            self._verify(staging.output, is_stopped)
            verify_seconds = time.monotonic() - began
        self.source.check_unchanged()
        finish(staging, self.target, self.manifest_name, overwrite=self.options.overwrite)
        return self._report(verify_seconds=verify_seconds, reused=staging.journal.num_reused, notes=[])

    def _verify(self, output: Path, is_stopped: Callable[[], bool]) -> None:
        total = self.plan.target_bytes
        with progress_bar("verify", self.num_tensors, total, is_shown=self.options.progress) as advance:
            verify_output(output, self.plan, self.weights, threads=self.threads, advance=advance, is_stopped=is_stopped)
        if self.verb is RESHARD:
            verify_optimizer(output, self.source, self.options, threads=self.threads, is_stopped=is_stopped)

    def _require_equal_output(self) -> None:
        embedding, output = self.plan.parameters[0].parameter, tied_output(self.source.config)
        for begin in range(0, embedding.shape[0], _SCAN_ROWS):
            end = min(begin + _SCAN_ROWS, embedding.shape[0])
            a, b = (self.source.hf_rows(item, 0, begin, end) for item in (embedding, output))
            if a.dtype != b.dtype or not torch.equal(_bits(a), _bits(b)):
                raise MismatchError(
                    f"{self.source.path}: config.json ties the embeddings (tie_word_embeddings), but the output matrix "
                    "differs from the embedding. One of the two is wrong: set tie_word_embeddings to false, or remove "
                    "lm_head.weight"
                )

    def _report(self, *, verify_seconds: float, reused: int, notes: list[str]) -> ConversionReport:
        notes = [*self.plan.notes, *notes]
        if self.weights.changed:
            notes.append(
                f"the cast changed values in {len(self.weights.changed)} parameters, by at most "
                f"{self.weights.max_cast_error:.3g}"
            )
        for note in notes:
            logger.info("%s: %s", self.target, note)
        return ConversionReport(
            **self._subject(notes),
            seconds=time.monotonic() - self.started - verify_seconds,
            verify_seconds=verify_seconds,
            reused_files=reused,
            max_cast_error=self.weights.max_cast_error,
        )

    def _subject(self, notes: Sequence[str]) -> dict[str, Any]:
        """Return the fields of `report.Subject`."""
        return {
            "direction": self.verb.direction,
            "source": str(self.source.path),
            "target": str(self.target),
            "tensors": self.num_tensors,
            "weight_bytes": self.plan.target_bytes,
            "dtype": self.plan.config.torch_dtype,
            "notes": tuple(notes),
        }


def _open(verb: Verb, path: Path, target: Path, options: ConversionOptions, **choice: Any) -> Source:
    """Open what the verb reads; if it cannot be, say in the same error what is wrong with the target."""
    try:
        source = open_source(path, allow_pickle=options.allow_pickle, **choice)
    except QwenError as error:
        problems = [error]
        _collect(problems, lambda: check_target(target, overwrite=options.overwrite or options.resume))
        _raise(problems)
        raise
    if isinstance(source, HfFolder) == verb.reads_hf:
        return source
    if verb.reads_hf:
        raise MismatchError(f"{path}: a Megatron checkpoint, expected a Hugging Face folder; use export or reshard")
    raise MismatchError(f"{path}: a Hugging Face folder, expected a Megatron checkpoint; use import")


def prepare(
    verb: Verb,
    source: WeightSource,
    target: Path,
    options: ConversionOptions,
    recipe: Mapping[str, Any] | None = None,
) -> Conversion:
    """Prove everything that can be proved without a weight; all that contradicts comes in one error.

    Args:
        verb: what is to be made of the source.
        source: the weights.
        target: the folder to be made.
        options: as asked for.
        recipe: what decides the values beside the source's files, as JSON types.
    """
    started = time.monotonic()
    problems: list[QwenError] = []
    target = follow(target)
    if not options.resume:
        inputs = (source.path, *source.side_folders())
        _collect(problems, lambda: check_target(target, overwrite=options.overwrite, inputs=inputs))
    plan = _collect(problems, lambda: source.plan(options.torch_dtype))
    weights = CheckedWeights(source, options.torch_dtype, allow_nonfinite=options.allow_nonfinite)
    files = _collect(problems, lambda: verb.files(source, plan, weights, options)) if plan is not None else None
    if plan is None or files is None:
        _raise(problems)
        raise AssertionError("no plan and no problem")
    fingerprint = {**fingerprint_of(verb.direction, source, target, plan, files, options), "recipe": recipe}
    _collect(problems, lambda: check_memory(files, options.max_memory))
    _collect(problems, lambda: check_disk(target, files, fingerprint, resume=options.resume))
    _raise(problems)
    return Conversion(
        verb=verb,
        source=source,
        target=target,
        plan=plan,
        weights=weights,
        files=tuple(files),
        options=options,
        fingerprint=fingerprint,
        started=started,
    )


def _collect(problems: list[QwenError], step: Callable[[], _T]) -> _T | None:
    try:
        return step()
    except QwenError as error:
        problems.append(error)
        return None


def _raise(problems: list[QwenError]) -> None:
    """Raise the problems as one error, of the kind of the first."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise type(problems[0])("\n".join(str(problem) for problem in problems))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
