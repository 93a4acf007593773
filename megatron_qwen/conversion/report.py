"""What a conversion would do and what it did, as data and as tables."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SAMPLE_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a conversion is about; the part that both reports share.

    Attributes:
        direction: "hf -> megatron", "megatron -> hf", "megatron -> megatron" or "dense hf -> moe hf".
        source, target: folders.
        tensors: Hugging Face tensors converted.
        weight_bytes: bytes of weights at the target.
        dtype: of the weights at the target.
        notes: what a user should know.
    """

    direction: str
    source: str
    target: str
    tensors: int
    weight_bytes: int
    dtype: str
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "notes": list(self.notes)}


@dataclass(frozen=True, kw_only=True)
class ConversionReport(Subject):
    """What a conversion did.

    Attributes:
        seconds: wall time, from reading headers to the rename, without the verification.
        verify_seconds: of reading the output again and comparing it.
        reused_files: files that an interrupted run had finished.
        max_cast_error: largest |x - cast(x)| where dtypes differ; 0 for a bitwise copy.
    """

    seconds: float
    verify_seconds: float
    reused_files: int
    max_cast_error: float

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**super().to_json(), "megabytes_per_second": self.megabytes_per_second}

    @property
    def megabytes_per_second(self) -> float:
        """Weight bytes at the target over `seconds`, in 10^6 bytes per second."""
        return self.weight_bytes / 1e6 / self.seconds


@dataclass(frozen=True)
class FileSize:
    """A file of the output and its size in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DryRun(Subject):
    """What a conversion would do.

    Attributes:
        files: of the output, the manifest excepted.
        total_bytes: of all of them.
        free_bytes: on the disk of the target.
        peak_memory_bytes: that the conversion holds at once, above what the interpreter and torch take.
        expected_seconds: from the rate at which this machine hashes and writes just now.
    """

    files: tuple[FileSize, ...]
    total_bytes: int
    free_bytes: int
    peak_memory_bytes: int
    expected_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {**super().to_json(), "files": [asdict(file) for file in self.files]}


def expected_seconds(num_bytes: int, folder: Path) -> float:
    """Return the time to hash and write `num_bytes`, measured on a few MiB in an unnamed file below `folder`."""
    sample = os.urandom(_SAMPLE_BYTES)
    began = time.perf_counter()
    hashlib.sha256(sample).digest()
    try:
        descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
    except OSError:
        # The file system has no unnamed files, or refuses writing, which the conversion itself reports.
        return num_bytes / _SAMPLE_BYTES * (time.perf_counter() - began)
    try:
        os.pwrite(descriptor, sample, 0)
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return num_bytes / _SAMPLE_BYTES * (time.perf_counter() - began)
