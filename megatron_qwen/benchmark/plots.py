"""Charts of `bench ops`: what was reached under the roofline, and by how much peers are slower or faster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_qwen.benchmark.ops.result import OpReport, OpRow

_MARKS = {"forward": "o", "backward": "s", "both": "D"}


def draw_roofline(report: OpReport, file: Path) -> None:
    """Draw our timed rows under copy and GEMM ceilings, and beside it the part of its ceiling that each reached."""
    pyplot = _pyplot()
    assert report.roofline is not None
    rows = [row for row in report.rows if row.is_ours and row.seconds]
    names = list(dict.fromkeys(_name(row) for row in rows))
    figure, (roof, reached) = pyplot.subplots(1, 2, figsize=(12, 2.5 + 0.2 * max(len(names), 10)), layout="constrained")
    _draw_roof(roof, report.roofline.rate("B/s"), report.roofline.rate("FLOP/s"), rows)
    colours = _colours(row.contestant for row in rows)
    for contestant, colour in colours.items():
        mine = [row for row in rows if row.contestant == contestant]
        places = [names.index(_name(row)) for row in mine]
        reached.plot([row.fraction for row in mine], places, "o", color=colour, label=contestant, markersize=4)
    reached.axvline(1.0, color="black", linewidth=1)
    _name_lines(reached, names, "part of the ceiling (copy or GEMM), one dot per shape")
    figure.suptitle(_title(report), fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_roof(axes: Any, copy: float, gemm: float, rows: Sequence[OpRow]) -> None:
    counted = [row for row in rows if row.flops]  # a gather has none
    intensities = [row.flops / row.num_bytes for row in counted]
    left, right = min([0.1, *intensities]) / 2, max([4 * gemm / copy, *intensities]) * 2
    axes.plot([left, gemm / copy, right], [left * copy / 1e12, gemm / 1e12, gemm / 1e12], color="black")
    axes.text(left * 1.2, left * copy / 1e12 * 4, f"copy {copy / 1e9:,.0f} GB/s", fontsize=8)
    axes.text(gemm / copy, gemm / 1e12 * 1.15, f"GEMM {gemm / 1e12:,.3g} TFLOP/s", fontsize=8, ha="center")
    for case, colour in _colours(row.case for row in counted).items():
        label: str | None = case
        for direction, mark in _MARKS.items():
            mine = [row for row in counted if (row.case, row.direction) == (case, direction)]
            if not mine:
                continue
            axes.plot(
                [row.flops / row.num_bytes for row in mine],
                [row.flops / row.median / 1e12 for row in mine],
                mark,
                color=colour,
                label=label,
                markersize=4,
            )
            label = None  # one line of the legend per case
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel("operations per byte (circle forward, square backward, diamond both)", fontsize=8)
    axes.legend(fontsize=7, loc="center right")


def draw_speedups(report: OpReport, file: Path) -> None:
    """Draw every timed peer's time over that of our fastest backend, a dot per shape; left of 1 the peer is faster."""
    pyplot = _pyplot()
    pairs = report.pairs()
    names = list(dict.fromkeys(_name(peer) for _, peer in pairs))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.3 * max(len(names), 4)), layout="constrained")
    ratios = [peer.median / ours.median for ours, peer in pairs]
    axes.axvspan(min([0.5, *ratios]) / 1.2, 1.0, color="tab:red", alpha=0.12)
    for contestant, colour in _colours(peer.contestant for _, peer in pairs).items():
        mine = [(ours, peer) for ours, peer in pairs if peer.contestant == contestant]
        places = [names.index(_name(peer)) for _, peer in mine]
        dots = [peer.median / ours.median for ours, peer in mine]
        axes.plot(dots, places, "o", color=colour, label=contestant, markersize=5, alpha=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    _name_lines(axes, names, "time of the peer / time of our fastest backend; shaded: we lose")
    axes.set_title(_title(report), fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _name_lines(axes: Any, names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.3)
    axes.set_xlabel(label, fontsize=8)
    axes.legend(fontsize=7)


def _colours(names: Any) -> dict[str, str]:
    return {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(names))}


def _name(row: OpRow) -> str:
    return f"{row.case} {row.direction}"


def _title(report: OpReport) -> str:
    return f"bench ops: {report.device}, commit {report.commit or 'unknown'}, {report.taken}"
