"""What a run reports: progress line, metrics.jsonl, TensorBoard events, and the peak behind MFU."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from megatron_qwen.checkpoint.atomic import atomic_write_text
from megatron_qwen.parallel.device import current_device, device_name

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"

# Dense peak in TFLOP/s by a part of the device's name, from NVIDIA's data sheets (without sparsity); first hit counts.
_BF16_PEAKS = (
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H20", 148.0),
    ("H800", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("A10", 125.0),
)


@dataclass(frozen=True)
class Peak:
    """The arithmetic ceiling of one rank's device.

    Attributes:
        tflops: TFLOP/s of one rank.
        source: what it is, for people: the device and how the number was obtained.
    """

    tflops: float
    source: str


@functools.cache
def device_peak(dtype: torch.dtype) -> Peak:
    """Return the peak of this rank's device: the data sheet's for a GPU we know, else a measured matrix product.

    On a CPU every rank measures, at the same time, so that ranks sharing cores see the share they will get.
    """
    known = data_sheet_peak(device_name(), dtype) if current_device().type == "cuda" else None
    return known or Peak(measure_gemm(dtype), f"{device_name()}, measured GEMM in {str(dtype).removeprefix('torch.')}")


def data_sheet_peak(name: str, dtype: torch.dtype) -> Peak | None:
    """Return the peak of the GPU called `name` in `dtype`; None if no data sheet of it is known here."""
    if dtype == torch.bfloat16:
        for part, tflops in _BF16_PEAKS:
            if part.lower() in name.lower():
                return Peak(tflops, f"{name}, data sheet, dense bf16")
    return None


def measure_gemm(dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.3) -> float:
    """Return the best TFLOP/s of a square matrix product in `dtype` on this rank's device with its present threads."""
    device = current_device()
    size = 8192 if device.type == "cuda" else size
    # Its own generator: the global one belongs to dropout, and must stand after a resume where it stood before.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        stop = time.perf_counter()
        best = max(best, 2.0 * size**3 / (stop - start) / 1e12)
        if stop > end:
            return best


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One line of metrics.jsonl.

    Attributes:
        step: from 1.
        samples, tokens: seen by the run so far, this step included.
        loss, aux_loss, grad_norm: see `StepResult`.
        lr: learning rate of this step.
        is_applied: whether the step changed the weights.
        seconds: of this step.
        tokens_per_second: over all ranks.
        tflops: model TFLOP/s per rank (causal attention counted as half).
        mfu: tflops over the device's peak.
        valid_loss: after this step, where it was measured.
    """

    step: int
    samples: int
    tokens: int
    loss: float
    aux_loss: float | None
    grad_norm: float
    lr: float
    is_applied: bool
    seconds: float
    tokens_per_second: float
    tflops: float
    mfu: float
    valid_loss: float | None = None

    def line(self, steps: int) -> str:
        """Return the progress line, in words that log parsers for Megatron-LM know."""
        aux = "" if self.aux_loss is None else f" | aux loss: {self.aux_loss:.4f}"
        valid = "" if self.valid_loss is None else f" | validation loss: {self.valid_loss:.4f}"
        skipped = "" if self.is_applied else " | NOT APPLIED: not finite"
        return (
            f"iteration {self.step:>6}/{steps:>6} | lm loss: {self.loss:.4f}{aux} | grad norm: {self.grad_norm:.3f}"
            f" | learning rate: {self.lr:.3E} | elapsed time per iteration (ms): {self.seconds * 1e3:.1f}"
            f" | tokens/s: {self.tokens_per_second:,.0f}"
            f" | throughput per GPU (TFLOP/s/GPU): {self.tflops:.3g} | MFU: {self.mfu:.1%}{valid}{skipped}"
        )


class MetricsLog:
    """Writes every step to metrics.jsonl, TensorBoard and the progress printer. Used by rank 0 alone."""

    def __init__(
        self,
        folder: Path,
        *,
        first_step: int,
        steps: int,
        log_every: int,
        tensorboard: bool | None,
        echo: Callable[[str], None],
    ) -> None:
        self.path = folder / METRICS_NAME
        self.steps, self.log_every, self.echo = steps, log_every, echo
        forget_steps_after(self.path, first_step)
        self._file: TextIO = self.path.open("a", encoding="utf-8")
        self._writer = _tensorboard_writer(folder / "tensorboard", tensorboard, first_step)

    def write(self, metrics: StepMetrics) -> None:
        """Record one step; print it if it is due."""
        values = {name: value for name, value in vars(metrics).items() if value is not None}
        # repr of a float round-trips bit for bit, and json writes repr; NaN and Infinity stay readable to Python.
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if name not in ("step", "samples", "tokens", "is_applied"):
                    self._writer.add_scalar(name, value, metrics.step)
        is_due = metrics.step % self.log_every == 0 or metrics.step in (1, self.steps)
        if is_due or not metrics.is_applied or metrics.valid_loss is not None:
            self.echo(metrics.line(self.steps))

    def close(self) -> None:
        """Flush and close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _tensorboard_writer(folder: Path, wanted: bool | None, first_step: int) -> Any:
    if wanted is False:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        level = logging.INFO if wanted is None else logging.WARNING
        logger.log(level, "tensorboard is not installed: no event files are written (pip install tensorboard)")
        return None
    from tensorboard.summary.writer import event_file_writer
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard puts the name of the machine into the name of the file; a run may be handed on.
    network = event_file_writer.socket
    event_file_writer.socket = types.SimpleNamespace(gethostname=lambda: "run")
    try:
        return SummaryWriter(log_dir=str(folder), purge_step=first_step + 1)
    finally:
        event_file_writer.socket = network


def forget_steps_after(path: Path, step: int) -> None:
    """Drop what an earlier, interrupted run recorded beyond the step that is resumed from."""
    if not path.exists():
        return
    kept = [json.dumps(values) for values in read_metrics(path) if values["step"] <= step]
    atomic_write_text(path, "".join(line + "\n" for line in kept))


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """Return the steps of a metrics.jsonl; a last line cut off by a kill is left out."""
    steps = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: a line was cut off by an interrupted run; leaving it out", path)
            continue
        steps.append(values)
    return steps
