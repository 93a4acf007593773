"""The conversions themselves: plan, prove, build aside, take the final name in one rename.

import_hf("Qwen2.5-0.5B", "megatron")        # Hugging Face -> Megatron torch_dist
export_hf("megatron", "hf")                  # and back, bit for bit
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_qwen.checkpoint import manifest
from megatron_qwen.checkpoint.atomic import commit, discard, make_staging, storage_errors
from megatron_qwen.conversion.hf import HfFolder, copy_companions, hf_writer, write_config
from megatron_qwen.conversion.loading import load_model, load_weights_into, open_source, read_config
from megatron_qwen.conversion.megatron import HF_FOLDER, RELEASE, TRACKER_NAME, MegatronFolder, write_torch_dist
from megatron_qwen.conversion.names import EMBEDDING_NAME
from megatron_qwen.conversion.numerics import NumericGuard
from megatron_qwen.conversion.parameters import hf_file_order, tied_output
from megatron_qwen.conversion.plan import ConversionPlan, PlannedParameter, plan_export, plan_import
from megatron_qwen.errors import ConfigError, MismatchError, StorageError
from megatron_qwen.model.config import QwenConfig

__all__ = [
    "ConversionReport",
    "export_hf",
    "import_hf",
    "load_model",
    "load_weights_into",
    "open_source",
    "read_config",
]

logger = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEFAULT_SHARD_BYTES = 50 * 10**9  # save_pretrained's
_THREADS = 2
# Side files, headers and zip framing of a torch_dist chunk, generously.
_OVERHEAD_BYTES, _OVERHEAD_PER_TENSOR = 32 * 2**20, 4096


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        direction: "hf -> megatron" or "megatron -> hf".
        source, target: folders.
        tensors: Hugging Face tensors converted.
        weight_bytes: bytes of weights at the target.
        dtype: of the weights at the target.
        seconds: wall time, from reading headers to the rename.
        max_cast_error: largest |x - cast(x)| where dtypes differ; 0 for a bitwise copy.
        notes: what a user should know.
    """

    direction: str
    source: str
    target: str
    tensors: int
    weight_bytes: int
    dtype: str
    seconds: float
    max_cast_error: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "notes": list(self.notes), "megabytes_per_second": self.megabytes_per_second}

    @property
    def megabytes_per_second(self) -> float:
        """Weight bytes at the target over wall time, in 10^6 bytes per second."""
        return self.weight_bytes / 1e6 / self.seconds


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    allow_nonfinite: bool = False,
) -> ConversionReport:
    """Convert a Hugging Face folder to a Megatron torch_dist checkpoint `out_dir/release`.

    Args:
        hf_dir: config.json and safetensors.
        out_dir: made in one rename when everything is written; `hf/` in it carries config and tokenizer.
        dtype: cast the weights; None keeps each tensor's dtype.
        overwrite: replace an existing `out_dir`, unless it holds training steps.
        progress: show a bar on stderr.
        allow_nonfinite: convert NaN and infinity as they are.

    Raises:
        MismatchError, ConfigError, CorruptInputError, IncompleteInputError, UnsafeInputError: the input.
        NumericsError: NaN, infinity, or overflow in `dtype`.
        StorageError: disk full, or the target is in the way.
    """
    started = time.monotonic()
    target = Path(out_dir)
    guard = NumericGuard(_dtype(dtype), allow_nonfinite=allow_nonfinite)
    source = HfFolder(Path(hf_dir))
    plan = plan_import(source.config, source.entries, where=str(hf_dir), dtype=guard.dtype)
    if plan.has_equal_output:
        _require_equal_output(source.tensor(EMBEDDING_NAME), source.tensor("lm_head.weight"), str(hf_dir))
    _check_target(target, overwrite=overwrite)
    with _staged(target, plan.target_bytes, len(plan.parameters), overwrite=overwrite) as staging:
        side, step = staging / HF_FOLDER, staging / RELEASE
        side.mkdir()
        step.mkdir()
        write_config(side, plan.config)
        copy_companions(source.path, side)
        with _bar("import", plan, progress) as advance:

            def read(item: PlannedParameter) -> Tensor:
                names = item.parameter.hf_names
                checked = [guard.check(name, source.tensor(name)) for name in names]
                tensor = source.assemble(item.parameter, checked)
                advance(len(names), item.target_bytes)
                return tensor

            write_torch_dist(step, plan, read)
        source.check_unchanged()
        manifest.write_manifest(step)
        (staging / TRACKER_NAME).write_text(RELEASE, encoding="utf-8")
    return _report("hf -> megatron", hf_dir, target, plan, guard, started)


def export_hf(
    megatron_dir: str | Path,
    out_dir: str | Path,
    *,
    step: int | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    config: QwenConfig | None = None,
) -> ConversionReport:
    """Convert the weights of a Megatron torch_dist checkpoint to a Hugging Face folder.

    Optimizer state and the like are passed over, with one logged line.

    Args:
        megatron_dir: an import, a training run, or one step's folder.
        out_dir: made in one rename when everything is written.
        step: the step of a run; None takes what the tracker names.
        dtype: cast the weights; None keeps each tensor's dtype.
        overwrite: replace an existing `out_dir`.
        progress: show a bar on stderr.
        allow_nonfinite: convert NaN and infinity as they are.
        max_shard_bytes: largest number of tensor bytes in one file.
        config: the model, for a checkpoint without `hf/config.json`.

    Raises:
        As `import_hf`.
    """
    started = time.monotonic()
    target = Path(out_dir)
    guard = NumericGuard(_dtype(dtype), allow_nonfinite=allow_nonfinite)
    source = MegatronFolder(Path(megatron_dir), step=step, config=config)
    plan = plan_export(source.config, source.stored, where=str(source.path), dtype=guard.dtype)
    if plan.has_equal_output:
        output = tied_output(source.config)
        embedding = plan.parameters[0].parameter
        _require_equal_output(source.hf_tensors(embedding)[0], source.hf_tensors(output)[0], str(source.path))
    _check_target(target, overwrite=overwrite)
    with _staged(target, plan.target_bytes, len(plan.parameters), overwrite=overwrite) as staging:
        write_config(staging, plan.config)
        side = next((folder for folder in source.side_folders() if folder.is_dir()), None)
        if side is not None:
            copy_companions(side, staging)
        order = hf_file_order(tuple(item.parameter for item in plan.parameters))
        dtypes = {name: item.target_dtype for item in plan.parameters for name in item.parameter.hf_names}
        with _bar("export", plan, progress) as advance, hf_writer(staging, order, dtypes, max_shard_bytes) as writer:

            def convert(item: PlannedParameter) -> None:
                for name, tensor in zip(item.parameter.hf_names, source.hf_tensors(item.parameter), strict=True):
                    writer.write(name, guard.check(name, tensor))
                advance(len(item.parameter.hf_names), item.target_bytes)

            _for_each(convert, plan.parameters)
        manifest.write_manifest(staging)
    return _report("megatron -> hf", source.path, target, plan, guard, started)


def _for_each(convert: Callable[[PlannedParameter], None], items: tuple[PlannedParameter, ...]) -> None:
    """Call `convert` on every item from a few threads; the first error ends it."""
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        futures = [pool.submit(convert, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    return dtype


def _require_equal_output(embedding: Tensor, output: Tensor, where: str) -> None:
    if embedding.dtype != output.dtype or not torch.equal(_bits(embedding), _bits(output)):
        raise MismatchError(
            f"{where}: config.json ties the embeddings (tie_word_embeddings), but the output matrix differs from the "
            "embedding. One of the two is wrong: set tie_word_embeddings to false, or remove lm_head.weight"
        )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _check_target(target: Path, *, overwrite: bool) -> None:
    with storage_errors(f"cannot use {target}"):
        if not target.exists():
            return
        if not target.is_dir():
            raise StorageError(f"{target}: is a file, expected a folder to be made; choose another name")
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise StorageError(f"{target}: exists and is not empty; choose another folder, or give --overwrite")
        steps = sorted(path.name for path in target.glob("iter_*"))
        if steps:
            raise StorageError(f"{target}: holds training steps ({steps[0]} ...), which --overwrite does not delete")


@contextmanager
def _staged(target: Path, weight_bytes: int, tensors: int, *, overwrite: bool) -> Iterator[Path]:
    """Give a staging folder; on success it becomes `target`, on failure it is deleted."""
    staging = make_staging(target)
    try:
        with storage_errors(f"cannot write {target}"):
            needed = weight_bytes + _OVERHEAD_BYTES + _OVERHEAD_PER_TENSOR * tensors
            free = shutil.disk_usage(staging).free
            if free < needed:
                raise StorageError(f"{target}: needs {needed:,} bytes, {free:,} are free on that disk; free some space")
            yield staging
        commit(staging, target, overwrite=overwrite or target.is_dir())
    except BaseException:
        discard(staging)
        raise


@contextmanager
def _bar(verb: str, plan: ConversionPlan, is_shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a function that is told (tensors, bytes) done; a bar with rate and time left on stderr if asked for."""
    if not is_shown:
        with nullcontext():
            yield lambda tensors, num_bytes: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    total = sum(len(item.parameter.hf_names) for item in plan.parameters)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tensors]}/" + f"{total} tensors"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(verb, total=plan.target_bytes, tensors=0)

        def advance(tensors: int, num_bytes: int) -> None:
            done = bar.tasks[task].fields["tensors"] + tensors
            bar.update(task, advance=num_bytes, tensors=done)

        yield advance


def _report(
    direction: str, source: str | Path, target: Path, plan: ConversionPlan, guard: NumericGuard, started: float
) -> ConversionReport:
    notes = list(plan.notes)
    if guard.num_cast:
        notes.append(f"the cast changed values in {guard.num_cast} tensors, by at most {guard.max_cast_error:.3g}")
    for note in notes:
        logger.info("%s: %s", target, note)
    return ConversionReport(
        direction=direction,
        source=str(source),
        target=str(target),
        tensors=sum(len(item.parameter.hf_names) for item in plan.parameters),
        weight_bytes=plan.target_bytes,
        dtype=plan.config.torch_dtype,
        seconds=time.monotonic() - started,
        max_cast_error=guard.max_cast_error,
        notes=tuple(notes),
    )
