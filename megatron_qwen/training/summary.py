"""What a finished run tells: the figures in summary.json and the return value of `train`."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class TrainSummary:
    """Figures of one call of `train`; losses in nats per token.

    Attributes:
        steps: optimizer steps done by the run so far, earlier calls included.
        resumed_from: the step this call went on from; None for a fresh start.
        interrupted: whether a signal or `stop_at` ended the call before the last step.
        first_loss, last_loss: of the run's first and last recorded step.
        valid_loss: the last validation loss, None if never measured.
        skipped_steps: steps not applied because loss or gradient was not finite.
        tokens: seen by the run.
        tokens_per_second, tflops, mfu: means over this call's steps but its first; tflops per rank.
        peak_memory_bytes: largest use of this rank's device, or of the process on a CPU.
        peak: what MFU is measured against.
        checkpoint, metrics, loss_curve, recipe: paths.
    """

    steps: int
    resumed_from: int | None
    interrupted: bool
    first_loss: float
    last_loss: float
    valid_loss: float | None
    skipped_steps: int
    tokens: int
    tokens_per_second: float
    tflops: float
    mfu: float
    peak_memory_bytes: int
    peak: str
    world_size: int
    checkpoint: str | None
    metrics: str
    loss_curve: str | None
    recipe: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


def peak_memory_bytes() -> int:
    """Return the largest memory use so far: allocated on this rank's GPU, else resident of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
