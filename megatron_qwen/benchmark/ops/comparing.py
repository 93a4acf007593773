"""Two runs of `bench ops` on the same kind of device, row by row."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_qwen.benchmark.ops.result import Key, OpReport, OpRow, shown_sizes
from megatron_qwen.errors import ConfigError, MismatchError


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row in both runs.

    Attributes:
        before, after: the rows.
        ratio: time after over time before; infinite where ours is no longer timed.
        is_regression: ours, slower by more than the threshold or no longer timed.
    """

    before: OpRow
    after: OpRow
    ratio: float
    is_regression: bool


@dataclass(frozen=True, kw_only=True)
class Changes:
    """All rows that were timed in the reference, and what one of the two runs lacks."""

    changes: tuple[Change, ...]
    only_before: tuple[OpRow, ...]
    only_after: tuple[OpRow, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Return the rows that make a comparison fail."""
        return tuple(each for each in self.changes if each.is_regression)


def parse_threshold(text: str) -> float:
    """Return "5%" or "0.05" as 0.05.

    Raises:
        ConfigError: neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%?)", text.strip())
    if match is None:
        raise ConfigError(f"--threshold {text!r}: expected a percentage like 5% or a fraction like 0.05")
    return float(match[1]) / (100 if match[2] else 1)


def compare_reports(before: OpReport, after: OpReport, threshold: float) -> Changes:
    """Compare what was timed in both.

    Args:
        before: the reference.
        after: the new run.
        threshold: how much slower ours may become, relative.

    Raises:
        MismatchError: different devices, or no row of the same case, shape and dtype in both.
    """
    if before.device != after.device:
        raise MismatchError(
            f"--compare: the reference was taken on {before.device!r}, this run on {after.device!r}; times of "
            "different devices say nothing about the code. Take a reference on this device."
        )
    old, new = _by_key(before.rows), _by_key(after.rows)
    timed = [key for key, row in old.items() if row.status == "timed"]
    shared = [key for key in timed if key in new]
    if not shared:
        raise MismatchError(
            f"--compare: no case of the same shape and dtype was timed in both. Reference: {_shapes(old.values())}. "
            f"This run: {_shapes(new.values())}. Choose the reference's --model, --seq-length and --dtype."
        )
    return Changes(
        changes=tuple(_change(old[key], new[key], threshold) for key in shared),
        only_before=tuple(old[key] for key in timed if key not in new),
        only_after=tuple(row for key, row in new.items() if row.status == "timed" and key not in timed),
    )


def _by_key(rows: Iterable[OpRow]) -> dict[Key, OpRow]:
    return {row.key: row for row in rows}


def _change(before: OpRow, after: OpRow, threshold: float) -> Change:
    if after.status != "timed":
        return Change(before=before, after=after, ratio=float("inf"), is_regression=after.is_ours)
    ratio = after.median / before.median
    return Change(before=before, after=after, ratio=ratio, is_regression=after.is_ours and ratio > 1 + threshold)


def _shapes(rows: Iterable[OpRow]) -> str:
    listed = sorted({f"{row.case} {row.model} ({shown_sizes(row.sizes)}) {row.dtype}" for row in rows})
    return "; ".join(listed[:6]) + (f"; and {len(listed) - 6} more" if len(listed) > 6 else "")
