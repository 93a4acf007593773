"""What `bench convert` found: rows with rate, memory and the bars both are held to; as table, JSON, CSV and chart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from megatron_qwen.benchmark.csv_lines import append_csv
from megatron_qwen.benchmark.timing import Summary

RATE_BAR = 0.6  # of the copy's rate
_MB = 1e6
COLUMNS = (
    "contestant", "s", "p10 .. p90", "CPU s", "MB/s", "of copy", "of +fsync", f"{RATE_BAR}x", "peak / limit MB",
    "memory", "start s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ConversionRow:
    """One contestant on one checkpoint.

    Attributes:
        checkpoint: what was converted.
        contestant: of the registry.
        seconds: per conversion, from the first header to the rename; process start and imports are not in it.
        cpu_seconds: processor seconds of all threads, median; other programs on the machine add little to them.
        verify_seconds: the part of `seconds`, median, that reading the output again and comparing it took.
        start_seconds: median of starting the process and importing.
        checkpoint_bytes: of the checkpoint's files.
        copied_bytes: that the contestant read and wrote of them; 0 for a dry run, which reads only headers.
        copy_fraction: our rate over that of the copy of the same round, median over the rounds; 0 for the copy itself
            and where nothing is copied.
        synced_copy_fraction: likewise, of the copy that ends with fsync.
        peak_bytes: largest resident set minus that after the imports, the largest of all rounds.
        interpreter_bytes: resident set after the imports.
        largest_tensor_bytes: of the checkpoint.
        has_rate_bar, has_memory_bar: whether the project promises them for this contestant.
        versions: of python and the libraries that the contestant loaded.
    """

    checkpoint: str
    contestant: str
    seconds: Summary
    cpu_seconds: float
    verify_seconds: float
    start_seconds: float
    checkpoint_bytes: int
    copied_bytes: int
    copy_fraction: float
    synced_copy_fraction: float
    peak_bytes: int
    interpreter_bytes: int
    largest_tensor_bytes: int
    has_rate_bar: bool
    has_memory_bar: bool
    versions: Mapping[str, str]

    @property
    def bytes_per_second(self) -> float:
        """Copied bytes over the median time."""
        return self.copied_bytes / self.seconds.median

    @property
    def memory_bar_bytes(self) -> int:
        """Three times the largest tensor and 200 MB."""
        return 3 * self.largest_tensor_bytes + 200 * 10**6

    @property
    def meets_rate_bar(self) -> bool:
        """Whether both fractions reach the bar: the copy with and the one without fsync."""
        return min(self.copy_fraction, self.synced_copy_fraction) >= RATE_BAR

    @property
    def meets_memory_bar(self) -> bool:
        """Whether the peak above the interpreter is within the bar."""
        return self.peak_bytes <= self.memory_bar_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        return {
            **asdict(self),
            "bytes_per_second": self.bytes_per_second,
            "rate_bar": RATE_BAR if self.has_rate_bar else None,
            "meets_rate_bar": self.meets_rate_bar if self.has_rate_bar else None,
            "memory_bar_bytes": self.memory_bar_bytes if self.has_memory_bar else None,
            "meets_memory_bar": self.meets_memory_bar if self.has_memory_bar else None,
        }


@dataclass(frozen=True, kw_only=True)
class ConversionBenchmark:
    """One run of `bench convert` on one machine.

    Attributes:
        device, commit, taken: as in `benchmark.report.Report`.
        setting: rounds, threads, cores and load of the machine at start and end.
        notes: what was left out, and why.
    """

    device: str
    commit: str
    taken: str
    setting: Mapping[str, Any]
    notes: tuple[str, ...]
    rows: tuple[ConversionRow, ...]

    def as_json(self) -> str:
        """Return the whole report as JSON."""
        return json.dumps({**asdict(self), "rows": [row.to_json() for row in self.rows]}, indent=2)


def tables(report: ConversionBenchmark) -> list[Table]:
    """Return one table for the terminal per checkpoint."""
    setting = ", ".join(f"{name} {value}" for name, value in report.setting.items())
    result = []
    for checkpoint in dict.fromkeys(row.checkpoint for row in report.rows):
        rows = [row for row in report.rows if row.checkpoint == checkpoint]
        title = (
            f"convert {checkpoint}: {rows[0].checkpoint_bytes / _MB:,.0f} MB, largest tensor "
            f"{rows[0].largest_tensor_bytes / _MB:,.0f} MB\n{setting}\n{report.device}, "
            f"commit {report.commit or 'unknown'}"
        )
        table = Table(title=title, box=SIMPLE, title_justify="left", padding=(0, 1))
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*_cells(row))
        result.append(table)
    return result


def _cells(row: ConversionRow) -> tuple[str, ...]:
    def judged(is_asked: bool, is_met: bool) -> str:
        return ("met" if is_met else "MISSED") if is_asked else "-"

    return (
        row.contestant,
        f"{row.seconds.median:.2f}",
        f"{row.seconds.p10:.2f} .. {row.seconds.p90:.2f}",
        f"{row.cpu_seconds:.2f}",
        f"{row.bytes_per_second / _MB:,.0f}" if row.copied_bytes else "-",
        f"{row.copy_fraction:.2f}" if row.copy_fraction else "-",
        f"{row.synced_copy_fraction:.2f}" if row.synced_copy_fraction else "-",
        judged(row.has_rate_bar, row.meets_rate_bar),
        f"{row.peak_bytes / _MB:,.0f} / " + (f"{row.memory_bar_bytes / _MB:,.0f}" if row.has_memory_bar else "-"),
        judged(row.has_memory_bar, row.meets_memory_bar),
        f"{row.start_seconds:.1f}",
    )


def write_conversion_report(report: ConversionBenchmark, folder: Path) -> list[Path]:
    """Write `convert.json`, `convert.csv` (appended to, one line per row) and `convert.png` into `folder`.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"convert{suffix}" for suffix in (".json", ".csv", ".png")]
    files[0].write_text(report.as_json() + "\n", encoding="utf-8")
    append_csv([_flat(report, row) for row in report.rows], files[1])
    _draw(report, files[2])
    return files


def _flat(report: ConversionBenchmark, row: ConversionRow) -> dict[str, Any]:
    return {
        "taken": report.taken,
        "commit": report.commit,
        "device": report.device,
        "setting": json.dumps(dict(report.setting)),
        "checkpoint": row.checkpoint,
        "contestant": row.contestant,
        "median_s": f"{row.seconds.median:.6g}",
        "p10_s": f"{row.seconds.p10:.6g}",
        "p90_s": f"{row.seconds.p90:.6g}",
        "rounds": row.seconds.count,
        "cpu_s": f"{row.cpu_seconds:.6g}",
        "verify_s": f"{row.verify_seconds:.6g}",
        "start_s": f"{row.start_seconds:.4g}",
        "mb": f"{row.checkpoint_bytes / _MB:.1f}",
        "mb_per_s": f"{row.bytes_per_second / _MB:.5g}",
        "of_copy": f"{row.copy_fraction:.4f}",
        "of_copy_fsync": f"{row.synced_copy_fraction:.4f}",
        "peak_mb": f"{row.peak_bytes / _MB:.1f}",
        "interpreter_mb": f"{row.interpreter_bytes / _MB:.1f}",
        "largest_tensor_mb": f"{row.largest_tensor_bytes / _MB:.1f}",
        "memory_bar_mb": f"{row.memory_bar_bytes / _MB:.1f}",
        "versions": json.dumps(dict(row.versions)),
    }


def _draw(report: ConversionBenchmark, file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = [f"{row.contestant}\n{row.checkpoint}" for row in report.rows]
    figure, (rates, peaks) = pyplot.subplots(
        1, 2, sharey=True, figsize=(10, 1.2 + 0.45 * len(names)), layout="constrained"
    )
    ours = ["tab:blue" if row.has_memory_bar else "tab:gray" for row in report.rows]
    rates.barh(names, [row.bytes_per_second / _MB for row in report.rows], color=ours)
    rates.set_xlabel("MB/s of checkpoint files, median")
    peaks.barh(names, [row.peak_bytes / _MB for row in report.rows], color=ours)
    bars = [(i, row.memory_bar_bytes / _MB) for i, row in enumerate(report.rows) if row.has_memory_bar]
    peaks.plot([bar for _, bar in bars], [i for i, _ in bars], "|", color="tab:red", markersize=14, label="bar")
    peaks.set_xlabel("peak memory above the interpreter, MB")
    peaks.legend(fontsize=7)
    rates.invert_yaxis()
    rates.tick_params(labelsize=7)
    setting = ", ".join(f"{name} {value}" for name, value in report.setting.items())
    figure.suptitle(f"convert: {setting}; {report.device}", fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
