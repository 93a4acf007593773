"""Runs `bench ops`: checks, then times, case by case; what is found is written after every shape."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch

from megatron_qwen.benchmark.clock import Clock, clock_of
from megatron_qwen.benchmark.ops.bars import judge
from megatron_qwen.benchmark.ops.case import OpCase, Sizes
from megatron_qwen.benchmark.ops.check import Verdict, check_contestants
from megatron_qwen.benchmark.ops.contestants import OpContestant, check_names, take_part
from megatron_qwen.benchmark.ops.graphs import graphed
from megatron_qwen.benchmark.ops.measure import Timing, measure_in_turn
from megatron_qwen.benchmark.ops.odd_sizes import DTYPES, check_odd_sizes, odd_shapes
from megatron_qwen.benchmark.ops.result import OpReport, OpRow, shown_sizes
from megatron_qwen.benchmark.ops.sanitize import TIMEOUT, sanitize
from megatron_qwen.benchmark.report import git_commit, now
from megatron_qwen.benchmark.roofline import Roofline, measure_roofline
from megatron_qwen.errors import ConfigError
from megatron_qwen.model.presets import PRESETS, find_preset
from megatron_qwen.parallel.device import device_name

# Enough for the median to stand still on a GPU; a CPU has less time to give.
ROUNDS = {"cuda": 50, "cpu": 10}
_PACKAGES = ("torch", "triton", "liger-kernel", "transformer-engine")


@dataclass(frozen=True, kw_only=True)
class OpsBench:
    """What to measure.

    Attributes:
        cases: of the registry.
        device: where.
        models: presets whose sizes are taken, "7b" is "qwen2.5-7b"; None for each case's own on this device.
        seq_lengths: tokens; empty for each case's own on this device.
        dtypes: of `odd_sizes.DTYPES`.
        backends: ours.
        versus: peers.
        rounds: measured rounds; 0 to check only.
        check: our backends at odd sizes too.
        sanitize: compute-sanitizer too.
        sanitize_limit: seconds for each of its tools.
        time_limit: seconds after which no other shape is begun; 0 for none.

    Raises:
        ConfigError: something unknown or out of range.
    """

    cases: tuple[OpCase, ...]
    device: torch.device
    models: tuple[str, ...] | None
    seq_lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    backends: tuple[str, ...]
    versus: tuple[str, ...]
    rounds: int
    check: bool = False
    sanitize: bool = False
    sanitize_limit: float = TIMEOUT
    time_limit: float = 0.0

    def __post_init__(self) -> None:
        if self.rounds < 0:
            raise ConfigError(f"--rounds: got {self.rounds}, expected at least 1, or 0 to measure nothing")
        if self.sanitize_limit <= 0:
            raise ConfigError(f"--sanitize-limit: got {self.sanitize_limit:g}, expected more than 0 seconds")
        if self.time_limit < 0:
            raise ConfigError(f"--time-limit: got {self.time_limit:g}, expected seconds, or 0 for none")
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ConfigError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        for length in self.seq_lengths:
            if length < 2:
                raise ConfigError(f"--seq-length {length}: expected at least 2")
        for model in self.models or ():
            preset_of(model)
        check_names(self.backends, self.versus)
        if self.models and not self.shapes():
            raise ConfigError(
                f"--model {','.join(self.models)}: no layer of {', '.join(case.name for case in self.cases)}; "
                "mixtures of experts are a2.7b and 57b"
            )

    def require_ours(self) -> None:
        """Raise ConfigError if no case can run on any of our backends: asked for by name, that is an error."""
        ours = [
            each
            for case in self.cases
            for dtype in self.dtypes
            for each in take_part(case, self.device, DTYPES[dtype], self.backends, ())
        ]
        if all(each.function is None for each in ours):
            raise ConfigError(f"--backend: nothing to measure; {ours[0].missing}")

    def shapes(self) -> list[tuple[OpCase, str, Sizes, str]]:
        """Return (case, model, sizes, dtype) of everything that is measured; sizes that repeat are left out."""
        found: dict[tuple[str, tuple[tuple[str, int], ...], str], tuple[OpCase, str, Sizes, str]] = {}
        kind = self.device.type
        for model, case in self._pairs():
            for length in self.seq_lengths or case.lengths[kind]:
                sizes = case.sizes(find_preset(preset_of(model)), length)
                if sizes and kind == "cpu" and case.on_cpu is not None:
                    sizes = case.on_cpu(sizes)
                for dtype in self.dtypes if sizes else ():
                    found.setdefault((case.name, tuple(sizes.items()), dtype), (case, model, sizes, dtype))
        return list(found.values())

    def _pairs(self) -> list[tuple[str, OpCase]]:
        """Model by model, so that a time limit leaves out the last models and not the last cases."""
        wanted = [(case, case.models[self.device.type] if self.models is None else self.models) for case in self.cases]
        models = dict.fromkeys(model for _, names in wanted for model in names)
        return [(model, case) for model in models for case, names in wanted if model in names]

    def num_steps(self) -> int:
        """Return how often `progress` is called."""
        odd = sum(len(odd_shapes(case)) for case in self.cases)
        return len(self.shapes()) + self.check * odd + self.sanitize + bool(self.rounds)

    def run(self, progress: Callable[[str], None], keep: Callable[[OpReport], None]) -> OpReport:
        """Check and measure everything, and judge the bars.

        Args:
            progress: called `num_steps` times with what was done.
            keep: called with the report so far: a run that is cut off has then left what it had.
        """
        begin = time.monotonic()
        report = OpReport(
            device=device_name(self.device),
            driver=_driver() if self.device.type == "cuda" else "",
            versions=_versions(),
            commit=git_commit(),
            taken=now(),
            setting=self._setting(),
            roofline=None,
            rows=(),
        )
        if self.check:
            odd = check_odd_sizes(self.cases, self.device, self.backends, progress)
            report = replace(report, odd_checks=tuple(odd))
            keep(report)
        if self.sanitize:
            kernels = [name for name in self.backends if name != "reference"]
            found = sanitize(self.device, kernels, [case.name for case in self.cases], self.sanitize_limit)
            report = replace(report, sanitizer=found)
            progress("compute-sanitizer")
        clock = clock_of(self.device)
        rooflines: dict[str, Roofline] = {}
        if self.rounds:
            rooflines = {name: measure_roofline(clock, DTYPES[name], self.rounds) for name in self.dtypes}
            ceilings = {ceiling.name: ceiling for each in rooflines.values() for ceiling in each.ceilings}
            report = replace(report, roofline=Roofline(ceilings=tuple(ceilings.values())))
            progress("ceilings")
        for case, model, sizes, dtype in self.shapes():
            if self.time_limit and time.monotonic() - begin > self.time_limit:
                missed = f"{case.name} {model} ({shown_sizes(sizes)}) {dtype}"
                report = replace(report, not_reached=(*report.not_reached, missed))
                continue
            rows = self._rows(case, model, sizes, dtype, clock, rooflines.get(dtype))
            report = replace(report, rows=(*report.rows, *rows))
            keep(report)
            progress(f"{case.name} {model}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # the next shape's blocks fit none of these
        measured = report.rows if self.device.type == "cuda" else ()
        return replace(report, bars=judge(measured) if self.rounds else ())

    def _setting(self) -> dict[str, object]:
        clock = {"cuda": "events, cold L2", "cpu": "host clock, cold cache"}[self.device.type]
        found: dict[str, object] = {"rounds": self.rounds, "clock": clock} if self.rounds else {"checks": "only"}
        return found | ({"threads": torch.get_num_threads()} if self.device.type == "cpu" else {})

    def _rows(
        self, case: OpCase, model: str, sizes: Sizes, dtype: str, clock: Clock, roofline: Roofline | None
    ) -> list[OpRow]:
        number = DTYPES[dtype]
        contestants = take_part(case, self.device, number, self.backends, self.versus)
        workload = case.workload(sizes, number, self.device, 1)
        verdicts = check_contestants(case, workload, contestants)
        start = OpRow(
            case=case.name, family=case.family, direction="", model=model, sizes=dict(sizes), dtype=dtype,
            contestant="", is_ours=True, status="missing", detail="", bound=case.bound,
        )  # fmt: skip
        if roofline is None:
            return [_checked(start, each, verdicts.get(each.name)) for each in contestants]
        names = {name for name, verdict in verdicts.items() if verdict.is_right}
        if case.is_graphed and self.device.type == "cuda":
            contestants = [graphed(workload, each) if each.name in names else each for each in contestants]
        right = [each for each in contestants if each.name in names and each.function is not None]
        rows = []
        for direction in case.directions:
            timings: dict[str, Timing] = {}
            if right:
                rounds = self.rounds if case.most_rounds is None else min(self.rounds, case.most_rounds(sizes))
                found = measure_in_turn(case, workload, direction, right, clock, rounds)
                timings = {each.name: timing for each, timing in zip(right, found, strict=True)}
            counted = replace(
                start,
                direction=direction,
                num_bytes=case.bytes_moved(sizes, direction, number.itemsize),
                flops=case.flops(sizes, direction),
            )
            for each in contestants:
                row = _checked(counted, each, verdicts.get(each.name))
                rows.append(_timed(row, timings[each.name], roofline) if each.name in timings else row)
        return rows


def _checked(start: OpRow, contestant: OpContestant, verdict: Verdict | None) -> OpRow:
    row = replace(start, contestant=contestant.name, is_ours=contestant.is_ours)
    if verdict is None or contestant.function is None:
        return replace(row, status="missing", detail=contestant.missing)
    status = "right" if verdict.is_right else "wrong"
    return replace(row, status=status, detail=verdict.detail, error=verdict.error, error_bound=verdict.bound)


def _timed(row: OpRow, timing: Timing, roofline: Roofline) -> OpRow:
    median = timing.seconds.median
    return replace(
        row,
        status="timed",
        seconds=timing.seconds,
        spread=abs(timing.again / median - 1) if timing.again else 0.0,
        is_pure=timing.is_pure,
        fraction=roofline.fraction(row.bound, median, row.num_bytes, row.flops),
        peak_bytes=timing.peak_bytes,
        saved_bytes=timing.saved_bytes,
    )


def preset_of(model: str) -> str:
    """Return the name of a preset: "7b" is "qwen2.5-7b", and "a2.7b" and "57b" are the mixtures of experts.

    Raises:
        ConfigError: there is none.
    """
    short = {"a2.7b": "qwen1.5-moe-a2.7b", "57b": "qwen2-57b-a14b"}
    key = model.strip().lower()
    name = short.get(key, f"qwen2.5-{key}")
    if name in PRESETS:
        return name
    find_preset(key)
    return key


def device_of(name: str | None) -> torch.device:
    """Return the device called "cpu" or "cuda"; without a name CUDA where there is a device.

    Raises:
        ConfigError: an unknown name, or no such device.
    """
    if name not in (None, "cpu", "cuda"):
        raise ConfigError(f"--device {name!r}: expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; `megatron-qwen doctor` shows what is here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.split("\n")[0].strip()


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def write_report(report: OpReport, folder: Path, command: str) -> list[Path]:
    """Write ops.json, summary.md, ops.csv if there are rows, roofline.png of our times, speedup.png if a peer has one.

    Returns:
        The files written.
    """
    from megatron_qwen.benchmark.ops.result import write_csv
    from megatron_qwen.benchmark.ops.show import summary
    from megatron_qwen.benchmark.plots import draw_roofline, draw_speedups

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("ops.json", "summary.md")]
    files[0].write_text(report.as_json() + "\n", encoding="utf-8")
    files[1].write_text(summary(report, command), encoding="utf-8")
    if report.rows:
        files.append(folder / "ops.csv")
        write_csv(report, files[-1])
    if any(row.is_ours and row.status == "timed" for row in report.rows):
        files.append(folder / "roofline.png")
        draw_roofline(report, files[-1])
    if report.pairs():
        files.append(folder / "speedup.png")
        draw_speedups(report, files[-1])
    return files
