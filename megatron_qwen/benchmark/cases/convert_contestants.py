"""Who takes part in `bench convert`. Each is built in a process of its own and steps once (see `worker.py`).

Building is what is paid once per process: the interpreter and imports. A step is one conversion of one folder.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from megatron_qwen.errors import ConfigError

# Of 1 to 16 MiB the quickest on the machines measured.
COPY_BYTES = 2**20


class Convert:
    """`convert import` or `export`, as the command runs it, without its progress bar.

    Args:
        source, target: folders.
        direction: "import" or "export".
        layout: tensor and pipeline parallel size of per-rank files; None for torch_dist.
        options: further fields of `ConversionOptions`.
    """

    amount = flops = 0.0

    def __init__(
        self, *, source: str, target: str, direction: str, layout: tuple[int, int] | None = None, **options: Any
    ) -> None:
        from megatron_qwen.conversion import run
        from megatron_qwen.parallel.layout import ParallelLayout

        if direction not in ("import", "export"):
            raise ConfigError(f"direction: got {direction!r}, expected import or export")
        self._convert = run.import_hf if direction == "import" else run.export_hf
        self._source, self._target = source, target
        self._options = {**options, "progress": False}
        if direction == "import" and layout is not None:
            tp, pp = layout
            self._options |= {"ckpt_format": "torch", "layout": ParallelLayout(tp=tp, pp=pp)}
        elif layout is not None:
            self._options["allow_pickle"] = True

    def step(self) -> float:
        """Convert; returns the seconds of it that verifying took."""
        return self._convert(self._source, self._target, **self._options).verify_seconds


class DryRun:
    """`convert import --dry-run`: everything that is proved from headers."""

    amount = flops = 0.0

    def __init__(self, *, source: str, target: str) -> None:
        from megatron_qwen.conversion import run

        self._prepare, self._source, self._target = run.prepare_import, source, target

    def step(self) -> float:
        """Plan and prove; returns the number of tensors."""
        return float(self._prepare(self._source, self._target, progress=False).dry_run().tensors)


class Copy:
    """The ceiling: every byte read once, hashed with SHA-256 and written, in one stream with one large buffer.

    Args:
        source, target: folders.
        fsync: force each file to the disk, as conversions do.
    """

    amount = flops = 0.0

    def __init__(self, *, source: str, target: str, fsync: bool) -> None:
        self._source, self._target, self._fsync = Path(source), Path(target), fsync

    def step(self) -> float:
        """Copy; returns the number of bytes."""
        buffer = memoryview(bytearray(COPY_BYTES))
        total = 0
        for path in sorted(self._source.rglob("*")):
            if not path.is_file():
                continue
            copy = self._target / path.relative_to(self._source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as source, copy.open("wb", buffering=0) as target:
                while count := source.readinto(buffer):
                    digest.update(buffer[:count])
                    written = target.write(buffer[:count])
                    assert written == count, (written, count)
                    total += count
                if self._fsync:
                    os.fsync(target.fileno())
        return float(total)


class TransformersSave:
    """The peer: `from_pretrained` and `save_pretrained` of the same folder, in the dtype of its files."""

    amount = flops = 0.0

    def __init__(self, *, source: str, target: str) -> None:
        from transformers import AutoModelForCausalLM

        self._class, self._source, self._target = AutoModelForCausalLM, source, target

    def step(self) -> float:
        """Load and save; returns the number of parameters."""
        model = self._class.from_pretrained(self._source, dtype="auto")
        model.save_pretrained(self._target)
        return float(model.num_parameters())
