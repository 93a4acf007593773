"""Bars, the sanitizer's verdict and the order of turns, from made-up figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_qwen.benchmark.clock import CudaClock, Sample
from megatron_qwen.benchmark.ops.bars import BARS, Bar, judge
from megatron_qwen.benchmark.ops.case import OpCase
from megatron_qwen.benchmark.ops.contestants import OpContestant
from megatron_qwen.benchmark.ops.measure import WARMUP, measure_in_turn
from megatron_qwen.benchmark.ops.registry import choose_cases
from megatron_qwen.benchmark.ops.result import OpRow
from megatron_qwen.benchmark.ops.sanitize import judge_output, sanitize
from megatron_qwen.benchmark.roofline import Ceiling, Roofline
from megatron_qwen.benchmark.timing import Summary


def row(contestant: str, microseconds: float, **fields: Any) -> OpRow:
    settings: dict[str, Any] = {
        "case": "rms_norm", "family": "norm", "direction": "forward", "model": "7b", "sizes": {"tokens": 16_384},
        "dtype": "bf16", "is_ours": contestant in ("cuda", "triton"), "status": "timed", "detail": "", "fraction": 0.9,
    }  # fmt: skip
    seconds = Summary(microseconds * 1e-6, microseconds * 0.99e-6, microseconds * 1.01e-6, 50)
    return OpRow(contestant=contestant, **{**settings, "seconds": seconds, **fields})


def one(bar: Bar, *rows: OpRow) -> tuple[str, str]:
    (judgement,) = judge(rows, (bar,))
    return judgement.status, judgement.detail


BAR = Bar(name="N1", case="rms_norm", direction="forward", models=("7b",), tokens=(16_384,), fraction=0.85,
          ahead=((("compile", "liger"), 1.0),))  # fmt: skip


def test_a_bar_takes_our_fastest_backend_and_the_fastest_peer() -> None:
    rows = [row("triton", 120, fraction=0.75), row("cuda", 100), row("compile", 150), row("liger", 110)]
    status, detail = one(BAR, *rows)
    assert status == "pass"
    assert detail == "7b 16384: cuda 0.900, 1.10x liger"


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([row("cuda", 100, fraction=0.84), row("liger", 110)], "fail"),
        ([row("cuda", 100), row("liger", 99)], "fail"),
        ([row("cuda", 100, spread=0.02), row("liger", 101)], "unclear"),
        ([row("cuda", 100, spread=0.02, fraction=0.86), row("liger", 110)], "unclear"),
        ([row("cuda", 100, spread=0.02), row("liger", 103)], "pass"),
        ([row("cuda", 100)], "incomplete"),
        ([row("cuda", 100, fraction=0.5)], "fail"),
        ([row("liger", 100)], "not judged"),
        ([row("cuda", 100, status="wrong", seconds=None), row("liger", 100)], "fail"),
        ([row("cuda", 100, dtype="fp32"), row("liger", 110)], "not judged"),
        ([row("cuda", 100, direction="backward"), row("liger", 110)], "not judged"),
        ([row("cuda", 100, model="72b"), row("liger", 110)], "not judged"),
    ],
)
def test_a_bar_is_met_by_more_than_the_noise(rows: list[OpRow], status: str) -> None:
    assert one(BAR, *rows)[0] == status


def test_one_shape_that_fails_fails_the_bar() -> None:
    bar = Bar(name="X", case="rms_norm", direction="forward", models=("7b", "72b"), tokens=(16_384,), fraction=0.85)
    assert one(bar, row("cuda", 100), row("cuda", 300, model="72b"))[0] == "pass"
    assert one(bar, row("cuda", 100), row("cuda", 300, model="72b", fraction=0.8))[0] == "fail"


def test_memory_and_the_time_of_another_case() -> None:
    memory = Bar(name="L1", case="rms_norm", direction="forward", models=("7b",), tokens=(16_384,),
                 memory=(("torch",), 0.5))  # fmt: skip
    assert one(memory, row("cuda", 100, peak_bytes=40), row("torch", 90, peak_bytes=100))[0] == "pass"
    assert one(memory, row("cuda", 100, peak_bytes=60), row("torch", 90, peak_bytes=100))[0] == "fail"
    assert one(memory, row("cuda", 100, peak_bytes=60), row("torch", 90))[0] == "not judged"
    beside = Bar(name="R4", case="rms_norm", direction="forward", models=("7b",), tokens=(16_384,),
                 beside=("swiglu", 1.05))  # fmt: skip
    assert one(beside, row("cuda", 104), row("cuda", 100, case="swiglu"))[0] == "pass"
    assert one(beside, row("cuda", 106), row("cuda", 100, case="swiglu"))[0] == "fail"
    assert one(beside, row("cuda", 106))[0] == "not judged"


def test_the_bars_ask_for_cases_and_directions_that_exist() -> None:
    cases = {case.name: case for case in choose_cases()}
    for bar in BARS:
        case = cases[bar.case]
        assert bar.direction in case.directions
        assert set(bar.tokens) <= set(case.lengths["cuda"])
        for peers, _ in bar.ahead:
            assert set(peers) & {"torch", "compile", *case.peers}, bar.name
        assert bar.beside is None or bar.beside[0] in cases


def test_fractions_of_the_ceiling_that_counts() -> None:
    seconds = Summary(1.0, 1.0, 1.0, 1)
    rates = (("a", "B/s", 80.0), ("b", "B/s", 100.0), ("c", "FLOP/s", 1000.0))
    roof = Roofline(ceilings=tuple(Ceiling(name=n, unit=u, rate=r, seconds=seconds) for n, u, r in rates))
    assert roof.fraction("memory", 2.0, 100, 10) == pytest.approx(0.5)
    assert roof.fraction("compute", 2.0, 100, 500) == pytest.approx(0.25)


class Turns:
    """A clock that notes whom it timed; the second turn of the first contestant takes a tenth longer."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.order: list[str] = []
        self.current = ""

    def time(self, prepare: Callable[[], Callable[[], object]]) -> Sample:
        prepare()()
        self.order.append(self.current)
        return Sample(1.1 if self.order[-1] == "a" and len(self.order) > 1 and self.order[-2] == "c" else 1.0)

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return 7


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_contestants_take_turns_and_the_first_one_again(direction: str) -> None:
    clock = Turns()
    (case,) = choose_cases((), ("rms_norm",))

    def contestant(name: str) -> OpContestant:
        def run(**given: Any) -> Any:
            clock.current = name
            return case.plain(**given)

        return OpContestant(name=name, is_ours=False, function=run)

    workload = case.workload({"tokens": 3, "hidden": 4}, torch.float32, clock.device, 0)
    timings = measure_in_turn(case, workload, direction, [contestant(name) for name in "abc"], clock, rounds=2)
    assert "".join(clock.order) == "a" * WARMUP + "b" * WARMUP + "c" * WARMUP + "abca" * 2
    assert [timing.again for timing in timings] == pytest.approx([1.1, 0, 0])
    assert [timing.seconds.count for timing in timings] == [2, 2, 2]
    assert timings[0].peak_bytes == 7


def test_what_is_changed_in_place_is_our_copy() -> None:
    case = OpCase(
        name="negate", family="", operation="swiglu", about="", outputs=("x",), directions=("forward",), in_place=True,
        sizes=lambda config, length: {}, workload=choose_cases((), ("swiglu",))[0].workload, ours=torch.neg,
        plain=torch.neg, bytes_moved=lambda *_: 0, flops=lambda *_: 0, odd_sizes=(),
    )  # fmt: skip
    workload = case.workload({"tokens": 2, "ffn": 3}, torch.float32, torch.device("cpu"), 0)
    before = workload.leaves["packed"].clone()
    negate = OpContestant(name="a", is_ours=False, function=lambda packed: packed.neg_())
    measure_in_turn(case, workload, "forward", [negate], Turns(), rounds=1)
    assert torch.equal(workload.leaves["packed"], before)


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "clean"),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
        (86, "========= Invalid __global__ write of size 2 bytes\n========= ERROR SUMMARY: 3 errors\n", "errors"),
        (86, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", "errors"),
        (1, '{"case": "rms_norm"}\n========= ERROR SUMMARY: 0 errors\n', "failed"),
        (255, "========= Error: Device not supported. Please refer to the supported devices\n", "not applicable"),
        (1, "Traceback: no module named torch\n", "failed"),
    ],
)
def test_the_verdict_of_the_sanitizer(status: int, output: str, expected: str) -> None:
    run = judge_output("memcheck", status, output)
    assert run.status == expected
    if expected == "errors":
        assert "SUMMARY" in run.detail


def test_without_a_gpu_the_sanitizer_is_not_applicable() -> None:
    runs = sanitize(torch.device("cpu"), ("triton",), ("rms_norm",))
    assert [run.tool for run in runs] == ["memcheck", "racecheck"]
    assert {run.status for run in runs} == {"not applicable"}


class Event:
    """A device that is as slow to begin as the bytes written before, of which the host needs `needed` to keep ahead."""

    needed = 0
    written = 0

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return Event.written < Event.needed

    def elapsed_time(self, other: Event) -> float:
        return 2.0


class Buffer:
    def zero_(self) -> None:
        Event.written += 1


@pytest.mark.parametrize(("needed", "is_pure", "runs"), [(4, True, 1), (30, True, 4), (1000, False, 5)])
def test_the_clock_writes_more_until_the_host_is_ahead_of_the_device(
    monkeypatch: pytest.MonkeyPatch, needed: int, is_pure: bool, runs: int
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = object.__new__(CudaClock)
    clock.device, clock._fills, clock._buffer = torch.device("cuda"), 4, Buffer()
    Event.needed, prepared = needed, []

    def prepare() -> Callable[[], object]:
        prepared.append(1)
        Event.written = 0
        return lambda: None

    assert clock.time(prepare) == Sample(2e-3, is_pure)
    assert len(prepared) == runs
    assert Event.written == 4 * 2 ** (runs - 1)
