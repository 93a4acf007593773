"""A report of `bench ops` for people: tables for the terminal, and a Markdown summary to commit beside the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.table import Table

from megatron_qwen.benchmark.ops.comparing import Changes
from megatron_qwen.benchmark.ops.result import OpReport, OpRow, shown_sizes

COLUMNS = (
    "op", "shape", "direction", "backend", "median us", "p10 .. p90", "rate", "of ceiling", "peak MiB", "saved MiB",
    "peers",
)  # fmt: skip


def result_lines(report: OpReport) -> list[tuple[str, ...]]:
    """Return the cells of one line per shape, direction and backend of ours."""
    lines = []
    for row in report.rows:
        if row.is_ours and row.status != "missing":
            peers = [each for each in report.rows if each.group == row.group and not each.is_ours]
            lines.append(_cells(row, peers))
    return lines


def _cells(row: OpRow, peers: Sequence[OpRow]) -> tuple[str, ...]:
    tokens, others = row.sizes.get("tokens", 0), {k: v for k, v in row.sizes.items() if k != "tokens"}
    shape = f"{row.model} {tokens:,} x {'/'.join(str(value) for value in others.values())} {row.dtype}"
    if row.seconds is None:
        return row.case, shape, row.direction or "-", row.contestant, row.status.upper(), "", "", "", "", "", row.detail
    rate, unit = row.rate()
    shown_rate = f"{rate / 1e9:,.1f} GB/s" if unit == "B/s" else f"{rate / 1e12:,.2f} TFLOP/s"
    return (
        row.case,
        shape,
        row.direction,
        row.contestant + ("" if row.is_pure else " (host-bound)"),
        f"{1e6 * row.median:,.1f}",
        f"{1e6 * row.seconds.p10:,.1f} .. {1e6 * row.seconds.p90:,.1f}",
        shown_rate,
        f"{row.fraction:.3f}",
        f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes else "-",
        f"{row.saved_bytes / 2**20:,.1f}" if row.saved_bytes else "-",
        ", ".join(_peer(row, each) for each in peers if each.status in ("timed", "wrong")),
    )


def _peer(ours: OpRow, peer: OpRow) -> str:
    if peer.seconds is None:
        return f"{peer.contestant} WRONG"
    ratio = peer.median / ours.median
    return f"{peer.contestant} {1e6 * peer.median:,.1f} ({ratio:.2f}x{' LOSS' if ratio < 1 else ''})"


def tables(report: OpReport) -> Iterator[Table]:
    """Yield the tables for the terminal: results, ceilings, bars."""
    title = f"bench ops: {report.device}, commit {report.commit or 'unknown'}, {_setting(report)}"
    yield _table(title, COLUMNS, result_lines(report), left=("op", "shape", "direction", "backend", "peers"))
    if report.roofline is not None:
        yield _table("ceilings", ("what", "rate", "median us"), _ceiling_lines(report), left=("what",))
    if lines := judged_bars(report):
        yield _table("bars", ("bar", "status", "asked", "found"), lines, left=("bar", "status", "asked", "found"))


def judged_bars(report: OpReport) -> list[tuple[str, ...]]:
    """Return the cells of every bar that could be judged, in part at least."""
    return [(each.bar, each.status, each.about, each.detail) for each in report.bars if each.status != "not judged"]


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], left: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE, title_justify="left", padding=(0, 1))
    for column in columns:
        wraps = column in ("peers", "found")
        table.add_column(column, justify="left" if column in left else "right", no_wrap=not wraps)
    for line in lines:
        table.add_row(*line)
    return table


def _ceiling_lines(report: OpReport) -> list[tuple[str, str, str]]:
    assert report.roofline is not None
    return [
        (
            each.name,
            f"{each.rate / 1e9:,.1f} GB/s" if each.unit == "B/s" else f"{each.rate / 1e12:,.3f} TFLOP/s",
            f"{1e6 * each.seconds.median:,.1f}",
        )
        for each in report.roofline.ceilings
    ]


def notes(report: OpReport) -> list[str]:
    """Return who did not take part and why, the noise, and what the checks of the odd sizes and the sanitizer said."""
    found: dict[str, dict[str, None]] = {}
    for row in report.rows:
        if row.status == "missing":
            found.setdefault(f"{row.contestant} is missing: {row.detail}", {})[row.case] = None
    lines = [f"{text} ({', '.join(cases)})" for text, cases in found.items()]
    spreads = [row.spread for row in report.rows if row.spread]
    if spreads:
        lines.append(
            f"noise: the same kernel measured twice in a round differs by up to {max(spreads):.1%} in the median"
        )
    if report.odd_checks:
        wrong = sum(not each.is_right for each in report.odd_checks)
        lines.append(f"odd sizes, in bf16, fp32 and fp16: {len(report.odd_checks)} checks, {wrong} wrong")
    if report.not_reached:
        lines.append(f"not reached within the time limit: {', '.join(report.not_reached)}")
    open_bars = [each.bar for each in report.bars if each.status == "not judged"]
    if open_bars:
        lines.append(f"bars not judged: {', '.join(open_bars)}")
    lines += [f"compute-sanitizer {run.tool}: {run.status} ({run.detail})" for run in report.sanitizer]
    return lines


def losses(report: OpReport) -> list[str]:
    """Return where the fastest of our backends is slower than a peer."""
    return [
        f"{ours.case} {ours.direction}, {ours.model}, {shown_sizes(ours.sizes)}, {ours.dtype}: {ours.contestant} takes "
        f"{ours.median / peer.median:.2f}x {peer.contestant}'s time"
        for ours, peer in report.pairs()
        if peer.median < ours.median
    ]


def summary(report: OpReport, command: str) -> str:
    """Return the report in Markdown.

    Args:
        report: of the run.
        command: that made it.
    """
    parts = [f"# bench ops on {report.device}\n", f"{report.taken}, commit {report.commit or 'unknown'}, "
             f"driver {report.driver or 'none'}, {_setting(report)}. "
             + ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".\n",
             f"```\n{command}\n```\n"]  # fmt: skip
    parts.append(
        "Each contestant is right against fp64 before it is timed. Ratios are the peer's median over ours; "
        "below 1 we lose. `ops.csv` and `ops.json` hold every row.\n"
    )
    if report.roofline is not None:
        parts.append(_markdown(("ceiling", "rate", "median us"), _ceiling_lines(report)))
    parts.append(_markdown(COLUMNS, result_lines(report)))
    if bars := judged_bars(report):
        parts.append("## Bars\n\n" + _markdown(("bar", "status", "asked", "found"), bars))
    for title, lines in (("Losses", losses(report)), ("Notes", notes(report)), ("Wrong", report.problems())):
        if lines:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines) + "\n")
    return "\n".join(parts)


def _markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _setting(report: OpReport) -> str:
    return ", ".join(f"{name} {value}" for name, value in report.setting.items())


def change_table(changes: Changes, threshold: float) -> Table:
    """Return the comparison of two runs as a table."""
    lines = []
    for each in changes.changes:
        before, after = each.before, each.after
        verdict = "REGRESSION" if each.is_regression else ""
        lines.append(
            (
                before.case,
                f"{before.model} {shown_sizes(before.sizes)} {before.dtype}",
                before.direction,
                before.contestant,
                f"{1e6 * before.median:,.1f}",
                f"{1e6 * after.median:,.1f}" if after.seconds else after.status,
                f"{each.ratio - 1:+.1%}" if after.seconds else "-",
                verdict,
            )
        )
    columns = ("op", "shape", "direction", "contestant", "us before", "us now", "change", "")
    title = f"against the reference: ours may become {threshold:.1%} slower"
    return _table(title, columns, lines, left=("op", "shape", "direction", "contestant", ""))
