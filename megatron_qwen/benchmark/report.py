"""What a benchmark found: rows with everything needed to repeat it, as table, JSON, CSV and bar chart."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from megatron_qwen.benchmark.breakdown import Breakdown
from megatron_qwen.benchmark.breakdown_report import append_breakdown_csv, draw_breakdown
from megatron_qwen.benchmark.csv_lines import append_csv
from megatron_qwen.benchmark.timing import Summary

COLUMNS = ("contestant", "ms/step", "p10", "p90", "ours/this", "{unit}/s", "TFLOP/s", "MFU", "peak MiB")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant of one case.

    Attributes:
        case, contestant: names of the registry.
        setting: what was run: model, layers, sizes, dtype, threads ...
        seconds: time per step.
        ratio: our median over this one's: below 1 we are faster; 1 for ourselves, 0 for a ceiling.
        amount_per_second: of `unit`.
        flops_per_second: by the convention named in `setting`; 0 if the case counts none.
        utilisation: flops_per_second over the report's ceiling; 0 if there is none.
        peak_bytes: most memory the contestant's process held, on a GPU allocated there, else resident; 0 if it has no
            process of its own.
        versions: of python and the libraries the contestant loaded.
    """

    case: str
    contestant: str
    setting: Mapping[str, Any]
    seconds: Summary
    ratio: float
    unit: str
    amount_per_second: float
    flops_per_second: float
    utilisation: float
    peak_bytes: int
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """One run of a case on one machine.

    Attributes:
        device: the GPU's or the CPU's name.
        commit: of this repository, with "+" for uncommitted changes; "" outside a repository.
        taken: UTC time, ISO 8601.
        agreement: largest relative difference of the contestants' check values.
        ceiling: what `Row.utilisation` is measured against: a GPU's data sheet, or a GEMM of the same run.
        breakdown: where our contestant's time goes, if it was asked for.
    """

    device: str
    commit: str
    taken: str
    agreement: float
    rows: tuple[Row, ...]
    ceiling: str = ""
    breakdown: Breakdown | None = None

    def as_json(self) -> str:
        """Return the whole report as JSON."""
        return json.dumps(asdict(self), indent=2)


def now() -> str:
    """Return the time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def git_commit() -> str:
    """Return the short commit this package is run from, "+" appended if its files differ; "" if there is none."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def table(report: Report) -> Table:
    """Return the report as a table for the terminal."""
    first = report.rows[0]
    setting = ", ".join(f"{name} {value}" for name, value in first.setting.items())
    title = f"{first.case}: {setting}\n{report.device}, commit {report.commit or 'unknown'}"
    if report.ceiling:
        title += f"\nMFU against {report.ceiling}"
    result = Table(title=title, box=SIMPLE, title_justify="left", padding=(0, 1))
    for column in COLUMNS:
        result.add_column(column.format(unit=first.unit), justify="left" if column == "contestant" else "right")
    for row in report.rows:
        result.add_row(*_cells(row))
    return result


def _cells(row: Row) -> tuple[str, ...]:
    def shown(value: float, text: str) -> str:
        return text if value else "-"

    return (
        row.contestant,
        f"{1e3 * row.seconds.median:,.1f}",
        f"{1e3 * row.seconds.p10:,.1f}",
        f"{1e3 * row.seconds.p90:,.1f}",
        shown(row.ratio, f"{row.ratio:.3f}"),
        shown(row.amount_per_second, f"{row.amount_per_second:,.0f}"),
        shown(row.flops_per_second, f"{row.flops_per_second / 1e12:.3f}"),
        shown(row.utilisation, f"{row.utilisation:.0%}"),
        shown(row.peak_bytes, f"{row.peak_bytes / 2**20:,.0f}"),
    )


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `<case>.json`, `<case>.csv` (appended to, one line per row) and `<case>.png` into `folder`.

    A breakdown adds `<case>-breakdown.csv` (appended to, one line per kind of operation) and its chart.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / report.rows[0].case
    files = [stem.with_suffix(suffix) for suffix in (".json", ".csv", ".png")]
    files[0].write_text(report.as_json() + "\n", encoding="utf-8")
    append_csv([_flat(report, row) for row in report.rows], files[1])
    _draw(report, files[2])
    if report.breakdown is not None:
        breakdown_files = [stem.with_name(f"{stem.name}-breakdown{suffix}") for suffix in (".csv", ".png")]
        first = report.rows[0]
        facts = {"taken": report.taken, "commit": report.commit, "device": report.device}
        append_breakdown_csv(report.breakdown, {**facts, "setting": dict(first.setting)}, breakdown_files[0])
        draw_breakdown(report.breakdown, _chart_title(first), breakdown_files[1])
        files += breakdown_files
    return files


def _flat(report: Report, row: Row) -> dict[str, Any]:
    return {
        "taken": report.taken,
        "commit": report.commit,
        "device": report.device,
        "case": row.case,
        "contestant": row.contestant,
        "setting": json.dumps(dict(row.setting)),
        "median_s": f"{row.seconds.median:.6g}",
        "p10_s": f"{row.seconds.p10:.6g}",
        "p90_s": f"{row.seconds.p90:.6g}",
        "steps": row.seconds.count,
        "ratio": f"{row.ratio:.4f}",
        f"{row.unit}_per_s": f"{row.amount_per_second:.6g}",
        "tflop_per_s": f"{row.flops_per_second / 1e12:.4g}",
        "utilisation": f"{row.utilisation:.4f}",
        "peak_mib": f"{row.peak_bytes / 2**20:.0f}",
        "agreement": f"{report.agreement:.2g}",
        "versions": json.dumps(dict(row.versions)),
    }


def _draw(report: Report, file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = _peers(report.rows)
    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.55 * len(rows)), layout="constrained")
    medians = [1e3 * row.seconds.median for row in rows]
    spread = [
        [1e3 * (row.seconds.median - row.seconds.p10) for row in rows],
        [1e3 * (row.seconds.p90 - row.seconds.median) for row in rows],
    ]
    colours = ["tab:blue" if row is rows[0] else "tab:gray" for row in rows]
    axes.barh([row.contestant for row in rows], medians, xerr=spread, color=colours, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel("ms per step: median, 10th and 90th percentile")
    axes.set_title(_chart_title(rows[0]), fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _chart_title(row: Row) -> str:
    return f"{row.case}: " + ", ".join(f"{name} {value}" for name, value in row.setting.items())


def _peers(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that do the case's work, without its ceilings."""
    return [row for row in rows if row.amount_per_second]
