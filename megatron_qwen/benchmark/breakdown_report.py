"""A breakdown of a training step as table, CSV and bar chart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from megatron_qwen.benchmark.breakdown import Breakdown, Part
from megatron_qwen.benchmark.csv_lines import append_csv

_COLUMNS = ("operation", "forward ms", "backward ms", "update ms", "total ms", "of the step", "TFLOP/s")
_CLOCKS = {"host": "wall time of the stepping thread", "device": "time of kernels; unattributed is a device at rest"}


def breakdown_table(breakdown: Breakdown) -> Table:
    """Return the breakdown as a table for the terminal."""
    title = (
        f"One step, mean of {breakdown.steps} profiled: {1e3 * breakdown.seconds:,.1f} ms, {breakdown.overhead:+.0%} "
        f"against as many plain ones right before\n{_CLOCKS[breakdown.clock]}"
    )
    result = Table(title=title, box=SIMPLE, title_justify="left", padding=(0, 1))
    for column in _COLUMNS:
        result.add_column(column, justify="left" if column == "operation" else "right")
    for part in breakdown.parts:
        result.add_row(*_cells(part, breakdown.seconds))
    total = sum(part.seconds for part in breakdown.parts)
    result.add_section()
    result.add_row("sum", "", "", "", f"{1e3 * total:,.2f}", f"{total / breakdown.seconds:.1%}", "")
    return result


def _cells(part: Part, step_seconds: float) -> tuple[str, ...]:
    times = (f"{1e3 * each:,.2f}" if each else "-" for each in (part.forward, part.backward, part.update))
    rate = part.flops / part.seconds / 1e12 if part.flops and part.seconds else 0.0
    return (
        part.kind,
        *times,
        f"{1e3 * part.seconds:,.2f}",
        f"{part.seconds / step_seconds:.1%}",
        f"{rate:.3f}" if rate else "-",
    )


def append_breakdown_csv(breakdown: Breakdown, facts: Mapping[str, Any], file: Path) -> None:
    """Append one line per kind of operation to `file`, each with `facts` (device, commit, setting ...)."""
    lines = [
        {
            **{name: json.dumps(value) if isinstance(value, dict) else value for name, value in facts.items()},
            "operation": part.kind,
            "clock": breakdown.clock,
            "forward_s": f"{part.forward:.6g}",
            "backward_s": f"{part.backward:.6g}",
            "update_s": f"{part.update:.6g}",
            "total_s": f"{part.seconds:.6g}",
            "fraction": f"{part.seconds / breakdown.seconds:.4f}",
            "flops": f"{part.flops:.6g}",
            "step_s": f"{breakdown.seconds:.6g}",
            "plain_step_s": f"{breakdown.plain_seconds:.6g}",
        }
        for part in breakdown.parts
    ]
    append_csv(lines, file)


def draw_breakdown(breakdown: Breakdown, title: str, file: Path) -> None:
    """Draw one bar per kind, forward, backward and update end to end, into `file` (PNG)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    kinds = [part.kind for part in breakdown.parts]
    figure, axes = pyplot.subplots(figsize=(7, 1.4 + 0.28 * len(kinds)), layout="constrained")
    left = [0.0] * len(kinds)
    for phase, colour in (("forward", "tab:blue"), ("backward", "tab:orange"), ("update", "tab:green")):
        widths = [1e3 * max(0.0, getattr(part, phase)) for part in breakdown.parts]
        axes.barh(kinds, widths, left=left, color=colour, label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, part in enumerate(breakdown.parts):
        axes.annotate(f" {part.seconds / breakdown.seconds:.1%}", (left[row], row), va="center", fontsize=7)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xlabel(f"ms of a profiled step of {1e3 * breakdown.seconds:,.1f} ms")
    axes.set_title(title, fontsize=8)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
