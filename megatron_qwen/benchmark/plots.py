"""Charts of `bench ops`: what was reached under the roofline, and by how much peers are slower or faster."""

from __future__ import annotations

from pathlib import Path

from megatron_qwen.benchmark.ops.result import OpReport

_MARKS = "osD^vP*X"


def draw_roofline(report: OpReport, file: Path) -> None:
    """Draw operations per byte against operations per second of our timed rows, under copy and GEMM ceilings."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    assert report.roofline is not None
    copy, gemm = report.roofline.rate("B/s"), report.roofline.rate("FLOP/s")
    rows = [row for row in report.rows if row.is_ours and row.seconds and row.flops]  # a gather has none
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    intensities = [row.flops / row.num_bytes for row in rows]
    left, right = min([0.1, *intensities]) / 2, max([4 * gemm / copy, *intensities]) * 2
    axes.plot([left, gemm / copy, right], [left * copy / 1e12, gemm / 1e12, gemm / 1e12], color="black")
    axes.annotate(f"copy {copy / 1e9:,.0f} GB/s", (left * 1.3, left * 1.3 * copy / 1e12), fontsize=8, rotation=35)
    axes.annotate(f"GEMM {gemm / 1e12:,.2f} TFLOP/s", (gemm / copy, gemm / 1e12 * 1.1), fontsize=8)
    for index, name in enumerate(dict.fromkeys(f"{row.case} {row.direction} ({row.contestant})" for row in rows)):
        mine = [row for row in rows if f"{row.case} {row.direction} ({row.contestant})" == name]
        axes.plot(
            [row.flops / row.num_bytes for row in mine],
            [row.flops / row.median / 1e12 for row in mine],
            _MARKS[index % len(_MARKS)],
            color=f"C{index % 10}",
            label=name,
            markersize=5,
        )
    axes.set(xscale="log", yscale="log", xlabel="operations per byte (by formula)", ylabel="TFLOP/s")
    axes.legend(fontsize=6, loc="lower right")
    axes.set_title(f"bench ops: {report.device}, commit {report.commit}", fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_speedups(report: OpReport, file: Path) -> None:
    """Draw every timed peer's time over that of our fastest backend; left of 1 the peer is faster."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    bars = []
    for ours, peer in report.pairs():
        name = f"{peer.case} {peer.direction} {peer.model} {peer.sizes.get('tokens', '')}"
        bars.append((f"{name} {peer.dtype}: {peer.contestant} / {ours.contestant}", peer.median / ours.median))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.22 * max(len(bars), 1)), layout="constrained")
    colours = ["tab:red" if ratio < 1 else "tab:blue" for _, ratio in bars]
    axes.barh([name for name, _ in bars], [ratio for _, ratio in bars], color=colours)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("time of the peer / time of our fastest backend (red: a loss)")
    axes.tick_params(labelsize=6)
    axes.set_title(f"bench ops: {report.device}, commit {report.commit}", fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
