"""The tables that `convert import|export|reshard` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from megatron_qwen.conversion.report import ConversionReport, DryRun

_FILES_SHOWN = 12


def print_conversion(report: ConversionReport) -> None:
    """Print what a conversion did."""
    rows = {
        "from": report.source,
        "to": report.target,
        "tensors": f"{report.tensors:,}",
        "weights": f"{report.weight_bytes / 1e6:,.1f} MB, {report.dtype}",
        "time": f"{report.seconds:.2f} s, {report.megabytes_per_second:,.0f} MB/s",
    }
    if report.verify_seconds:
        rows["verified"] = f"equal to the last bit, {report.verify_seconds:.2f} s more"
    if report.reused_files:
        rows["resumed"] = f"{report.reused_files} files were finished before"
    _print(report.direction, rows, report.notes)


def print_dry_run(plan: DryRun) -> None:
    """Print what a conversion would do."""
    from rich.table import Table

    rows = {
        "from": plan.source,
        "to": plan.target,
        "tensors": f"{plan.tensors:,}",
        "weights": f"{plan.weight_bytes / 1e6:,.1f} MB, {plan.dtype}",
        "on disk": f"{plan.total_bytes / 1e6:,.1f} MB in {len(plan.files)} files, {plan.free_bytes / 1e6:,.0f} MB free",
        "peak memory": f"{plan.peak_memory_bytes / 1e6:,.0f} MB for tensors, beside Python and torch",
        "expected time": f"{plan.expected_seconds:,.1f} s at the rate of this moment",
    }
    console = _print(f"{plan.direction}: the plan; nothing is written", rows, ())
    files = Table()
    files.add_column("file", overflow="fold")
    files.add_column("bytes", justify="right")
    largest = sorted(plan.files, key=lambda file: -file.bytes)
    for file in largest[:_FILES_SHOWN]:
        files.add_row(file.name, f"{file.bytes:,}")
    if rest := largest[_FILES_SHOWN:]:
        files.add_row(f"and {len(rest)} more", f"{sum(file.bytes for file in rest):,}")
    console.print(files)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False)


def _print(title: str, rows: Mapping[str, str], notes: Sequence[str]) -> Console:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False)
    return console
