"""What `bench ops` found: one row per contestant, shape and direction, with all that is needed to repeat it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_qwen.benchmark.roofline import Ceiling, Roofline
from megatron_qwen.benchmark.timing import Summary
from megatron_qwen.errors import CorruptInputError
from megatron_qwen.strict_json import read_strict_json

STATUSES = ("timed", "right", "wrong", "missing")
_MAX_BYTES = 64 * 2**20
Key = tuple[str, str, str, tuple[tuple[str, int], ...], str, str]


@dataclass(frozen=True, kw_only=True)
class OpRow:
    """One contestant at one shape and direction.

    Attributes:
        case, family, direction: of the registry; direction "" in a run that only checks.
        model: preset that gave the sizes.
        sizes: by name.
        dtype: "bf16", "fp16" or "fp32".
        contestant: a backend of ours ("cuda", "triton", "reference") or a peer.
        is_ours: which of the two.
        status: "timed", "right" (checked, not timed), "wrong" (no time is given) or "missing".
        detail: why it is missing, or the worst result of the check.
        bound: "memory" or "compute": which ceiling counts.
        seconds: of one run; None unless timed.
        spread: relative difference of the medians of our first contestant's two turns per round; 0 for the others.
        is_pure: False if the time may contain waiting for the host.
        num_bytes, flops: by the case's formulas.
        fraction: of the ceiling; 0 unless timed.
        peak_bytes: by how much memory grew.
        saved_bytes: what forward keeps for backward beside inputs and outputs.
        error, error_bound: largest difference from fp64 of the worst result, and what was allowed.
    """

    case: str
    family: str
    direction: str
    model: str
    sizes: Mapping[str, int]
    dtype: str
    contestant: str
    is_ours: bool
    status: str
    detail: str
    bound: str = "memory"
    seconds: Summary | None = None
    spread: float = 0.0
    is_pure: bool = True
    num_bytes: int = 0
    flops: int = 0
    fraction: float = 0.0
    peak_bytes: int = 0
    saved_bytes: int = 0
    error: float = 0.0
    error_bound: float = 0.0

    def __post_init__(self) -> None:
        assert self.status in STATUSES, self.status
        assert (self.seconds is not None) == (self.status == "timed"), self

    @property
    def group(self) -> tuple[str, str, str, tuple[tuple[str, int], ...], str]:
        """Return what all contestants of one comparison share."""
        return self.case, self.direction, self.model, tuple(sorted(self.sizes.items())), self.dtype

    @property
    def key(self) -> Key:
        """Return what names this row among those of a run."""
        return (*self.group, self.contestant)

    @property
    def median(self) -> float:
        """Return the median in seconds of a timed row."""
        assert self.seconds is not None, self.key
        return self.seconds.median

    def rate(self) -> tuple[float, str]:
        """Return bytes or operations per second of a timed row, whichever its ceiling counts, and the unit."""
        return (self.num_bytes / self.median, "B/s") if self.bound == "memory" else (self.flops / self.median, "FLOP/s")


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One bar and its figures.

    Attributes:
        bar: its name.
        about: what it asks.
        status: "pass", "fail", "unclear" (met by less than the noise), "incomplete" (nothing failed, but a peer or a
            shape was not timed) or "not judged" (nothing could be).
        detail: the figures of every shape.
    """

    bar: str
    about: str
    status: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class OddCheck:
    """One of our backends at sizes that fit no block, in one dtype."""

    case: str
    sizes: Mapping[str, int]
    dtype: str
    contestant: str
    is_right: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class SanitizerRun:
    """What a tool of compute-sanitizer said: "clean", "errors", "failed" or "not applicable"."""

    tool: str
    status: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class OpReport:
    """One run of `bench ops`.

    Attributes:
        device: the GPU's or the CPU's name.
        driver: of the GPU; "" on a CPU.
        versions: of python and the libraries that took part.
        commit: of this repository, with "+" for uncommitted changes.
        taken: UTC time, ISO 8601.
        setting: rounds, threads and the like.
        roofline: the ceilings; None in a run that only checks.
        rows: by shape, direction and contestant.
        odd_checks: of `--check`.
        sanitizer: of `--sanitize`.
        bars: judged on a GPU.
        not_reached: what the time limit left no time for.
    """

    device: str
    driver: str
    versions: Mapping[str, str]
    commit: str
    taken: str
    setting: Mapping[str, Any]
    roofline: Roofline | None
    rows: tuple[OpRow, ...]
    odd_checks: tuple[OddCheck, ...] = ()
    sanitizer: tuple[SanitizerRun, ...] = ()
    bars: tuple[Judgement, ...] = ()
    not_reached: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Return what is wrong with ours: results that are not right, errors the sanitizer saw."""
        found = [
            f"{row.case} {shown_sizes(row.sizes)} {row.contestant}: {row.detail}"
            for row in self.rows
            if row.is_ours and row.status == "wrong"
        ]
        found += [
            f"{each.case} {shown_sizes(each.sizes)} {each.dtype} {each.contestant}: {each.detail}"
            for each in self.odd_checks
            if not each.is_right
        ]
        found += [f"{run.tool}: {run.detail}" for run in self.sanitizer if run.status in ("errors", "failed")]
        return list(dict.fromkeys(found))

    def pairs(self) -> list[tuple[OpRow, OpRow]]:
        """Return (the fastest of our backends, a peer) for every timed peer at every shape and direction."""
        found = []
        for group in dict.fromkeys(row.group for row in self.rows):
            here = [row for row in self.rows if row.group == group and row.status == "timed"]
            ours = min((row for row in here if row.is_ours), key=lambda row: row.median, default=None)
            found += [(ours, row) for row in here if ours is not None and not row.is_ours]
        return found

    def as_json(self) -> str:
        """Return the whole report as JSON."""
        return json.dumps(asdict(self), indent=1)


def shown_sizes(sizes: Mapping[str, int]) -> str:
    """Return sizes as "16384 tokens, 3584 hidden"."""
    return ", ".join(f"{value} {name}" for name, value in sizes.items())


def read_report(path: Path) -> OpReport:
    """Read what `OpReport.as_json` wrote.

    Raises:
        IncompleteInputError: there is no such file.
        CorruptInputError: it is no such report.
    """
    content = read_strict_json(path, max_bytes=_MAX_BYTES)
    try:
        roofline = content["roofline"]
        return OpReport(
            **{name: content[name] for name in ("device", "driver", "versions", "commit", "taken", "setting")},
            roofline=roofline and Roofline(ceilings=tuple(_ceiling(each) for each in roofline["ceilings"])),
            rows=tuple(_row(each) for each in content["rows"]),
            odd_checks=tuple(OddCheck(**each) for each in content["odd_checks"]),
            sanitizer=tuple(SanitizerRun(**each) for each in content["sanitizer"]),
            bars=tuple(Judgement(**each) for each in content["bars"]),
            not_reached=tuple(content["not_reached"]),
        )
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CorruptInputError(f"{path}: no report of bench ops ({type(error).__name__}: {error})") from error


def _row(content: Mapping[str, Any]) -> OpRow:
    seconds = content["seconds"]
    return OpRow(**{**content, "seconds": seconds and Summary(**seconds)})


def _ceiling(content: Mapping[str, Any]) -> Ceiling:
    return Ceiling(**{**content, "seconds": Summary(**content["seconds"])})


def write_csv(report: OpReport, file: Path) -> None:
    """Write one line per row, with the facts of the run on each."""
    facts = {
        "taken": report.taken,
        "commit": report.commit,
        "device": report.device,
        "driver": report.driver,
        "versions": json.dumps(dict(report.versions)),
    }
    lines = [{**facts, **_flat(row)} for row in report.rows]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _flat(row: OpRow) -> dict[str, Any]:
    seconds = row.seconds

    def shown(value: float, digits: str) -> str:
        return format(value, digits) if seconds else ""

    return {
        "case": row.case,
        "direction": row.direction,
        "model": row.model,
        "sizes": json.dumps(dict(row.sizes)),
        "dtype": row.dtype,
        "contestant": row.contestant,
        "is_ours": int(row.is_ours),
        "status": row.status,
        "median_us": shown(1e6 * seconds.median if seconds else 0, ".2f"),
        "p10_us": shown(1e6 * seconds.p10 if seconds else 0, ".2f"),
        "p90_us": shown(1e6 * seconds.p90 if seconds else 0, ".2f"),
        "rounds": seconds.count if seconds else "",
        "spread": shown(row.spread, ".4f") if row.spread else "",
        "is_pure": int(row.is_pure) if seconds else "",
        "bytes": row.num_bytes,
        "flops": row.flops,
        "gb_per_s": shown(row.num_bytes / seconds.median / 1e9 if seconds else 0, ".1f"),
        "tflop_per_s": shown(row.flops / seconds.median / 1e12 if seconds else 0, ".3f"),
        "bound": row.bound,
        "fraction": shown(row.fraction, ".4f"),
        "peak_bytes": row.peak_bytes if seconds else "",
        "saved_bytes": row.saved_bytes if seconds else "",
        "error": f"{row.error:.3e}",
        "error_bound": f"{row.error_bound:.3e}",
        "detail": row.detail,
    }
