"""Runs one case: builds every contestant in its own process, steps them in turn, and reports."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_qwen.benchmark.registry import Case, Contestant, choose
from megatron_qwen.benchmark.report import Report, Row, git_commit, now
from megatron_qwen.benchmark.timing import check_agreement, step_in_turn, summarise
from megatron_qwen.benchmark.worker import Step, Worker
from megatron_qwen.errors import ConfigError
from megatron_qwen.parallel.device import device_name
from megatron_qwen.training.rank import TORCH_DTYPES


def run_case(
    case: Case,
    arguments: Mapping[str, Any],
    setting: Mapping[str, Any],
    *,
    versus: Sequence[str] = (),
    threads: int | None = None,
    warmup: int = 2,
    rounds: int = 10,
    on_round: Callable[[int], None] | None = None,
    profile: Mapping[str, Any] | None = None,
) -> Report:
    """Measure our contestant of `case`, and in turn with it those named in `versus`.

    Args:
        case: of the registry.
        arguments: JSON values, given to every contestant's factory.
        setting: what the report says was run; `dtype` in it selects the case's tolerance.
        versus: names of contestants.
        threads: per contestant; None leaves the libraries' own choice.
        warmup: steps of each contestant before measuring.
        rounds: measured steps of each contestant.
        on_round: called with the number of rounds done.
        profile: arguments of `breakdown` of our contestant, a `worker.ProfiledRunner`: called once all is measured.

    Raises:
        ConfigError: rounds or warm-up out of range, or an unknown name in `versus`.
        MismatchError: the contestants do not compute the same.
        RankFailure: a contestant died.
    """
    if rounds < 1 or warmup < 0:
        raise ConfigError(f"steps: got {rounds} after {warmup} of warm-up, expected at least 1 after at least 0")
    contestants = choose(case, tuple(versus))
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(each.name, each.factory, arguments, threads=threads)) for each in contestants
        ]
        steps = step_in_turn(workers, warmup=warmup, rounds=rounds, on_round=on_round)
        agreement = _agreement(contestants, steps, case.tolerance[setting["dtype"]])
        peak, ceiling = _ceiling(contestants, workers, steps, setting["dtype"])
        rows = _rows(case, contestants, workers, steps, setting, peak)
        breakdown = None
        if profile is not None:
            breakdown = workers[0].breakdown(**profile)
    return Report(
        device=device_name(),
        commit=git_commit(),
        taken=now(),
        agreement=agreement,
        rows=rows,
        ceiling=ceiling,
        breakdown=breakdown,
    )


def _ceiling(
    contestants: Sequence[Contestant], workers: Sequence[Worker], steps: Sequence[Sequence[Step]], dtype: str
) -> tuple[float, str]:
    """FLOP/s that utilisation is measured against, and what they are; 0 and "" where the case has no ceiling."""
    # Noise only ever slows a product down: its quickest tenth is the nearest to what the machine can do.
    measured = [
        worker.flops / summarise([step.seconds for step in mine]).p10
        for contestant, worker, mine in zip(contestants, workers, steps, strict=True)
        if contestant.is_ceiling
    ]
    if not measured:
        return 0.0, ""
    import torch

    from megatron_qwen.training.metrics import data_sheet_peak

    known = data_sheet_peak(device_name(), TORCH_DTYPES[dtype]) if torch.cuda.is_available() else None
    if known is not None:
        return 1e12 * known.tflops, f"{known.source}: {known.tflops:,.1f} TFLOP/s"
    return max(measured), f"GEMM measured in this run: {max(measured) / 1e12:.3f} TFLOP/s"


def _agreement(contestants: Sequence[Contestant], steps: Sequence[Sequence[Step]], tolerance: float) -> float:
    compared = [(each.name, mine) for each, mine in zip(contestants, steps, strict=True) if not each.is_ceiling]
    names = [name for name, _ in compared]
    return check_agreement(names, [[step.value for step in mine] for _, mine in compared], tolerance)


def _rows(
    case: Case,
    contestants: Sequence[Contestant],
    workers: Sequence[Worker],
    steps: Sequence[Sequence[Step]],
    setting: Mapping[str, Any],
    peak: float,
) -> tuple[Row, ...]:
    summaries = [summarise([step.seconds for step in mine]) for mine in steps]
    rows = []
    for contestant, worker, seconds in zip(contestants, workers, summaries, strict=True):
        rate = worker.flops / seconds.median
        rows.append(
            Row(
                case=case.name,
                contestant=contestant.name,
                setting=setting,
                seconds=seconds,
                ratio=0.0 if contestant.is_ceiling else summaries[0].median / seconds.median,
                unit=case.unit,
                amount_per_second=0.0 if contestant.is_ceiling else worker.amount / seconds.median,
                flops_per_second=rate,
                utilisation=rate / peak if peak else 0.0,
                peak_bytes=worker.peak_bytes(),
                versions=worker.versions,
            )
        )
    return tuple(rows)
