"""Times the contestants of one case and direction in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_qwen.benchmark.clock import Clock, Run, Sample
from megatron_qwen.benchmark.ops.case import Call, OpCase, Workload, copies
from megatron_qwen.benchmark.ops.contestants import OpContestant
from megatron_qwen.benchmark.timing import Summary, summarise

WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one contestant took.

    Attributes:
        seconds: of one run.
        is_pure: whether no run waited for the host; see `clock.Sample`.
        again: median of the second turn of the first contestant in each round; 0 for the others.
        peak_bytes: by how much memory grew at its peak, forward included.
        saved_bytes: what forward keeps for backward beside inputs and outputs.
    """

    seconds: Summary
    is_pure: bool
    again: float
    peak_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class _Turn:
    """`prepare` is not timed (a forward pass before its backward); what it returns is."""

    contestant: OpContestant
    prepare: Callable[[], Run]


def measure_in_turn(
    case: OpCase,
    workload: Workload,
    direction: str,
    contestants: Sequence[OpContestant],
    clock: Clock,
    rounds: int,
) -> list[Timing]:
    """Time every contestant once per round, the first one again at its end: A B C A, A B C A, ...

    The two medians of the first say how much of a difference is noise.

    Args:
        case: what is computed.
        workload: shared by all, but for copies of what is changed in place.
        direction: of `case.directions`.
        contestants: with functions that were found right.
        clock: of the workload's device.
        rounds: at least 1.
    """
    turns = [_turn(case, workload, direction, each) for each in contestants]
    for turn in turns:
        for _ in range(WARMUP):
            _time(turn, clock)
    samples: list[list[Sample]] = [[] for _ in turns]
    again: list[Sample] = []
    for _ in range(rounds):
        for turn, mine in zip(turns, samples, strict=True):
            mine.append(_time(turn, clock))
        again.append(_time(turns[0], clock))
    timings = []
    for index, (turn, mine) in enumerate(zip(turns, samples, strict=True)):
        timings.append(
            Timing(
                seconds=summarise([each.seconds for each in mine]),
                is_pure=all(each.is_pure for each in mine),
                again=summarise([each.seconds for each in again]).median if index == 0 else 0.0,
                peak_bytes=_peak_bytes(turn, clock),
                saved_bytes=_saved_bytes(case, workload, turn.contestant),
            )
        )
    return timings


def _time(turn: _Turn, clock: Clock) -> Sample:
    with turn.contestant.scope():
        return clock.time(turn.prepare)


def _peak_bytes(turn: _Turn, clock: Clock) -> int:
    with turn.contestant.scope():
        return clock.peak_bytes(lambda: turn.prepare()())


def _saved_bytes(case: OpCase, workload: Workload, contestant: OpContestant) -> int:
    if not case.has_gradient:
        return 0
    assert contestant.function is not None
    with contestant.scope():
        return Call(workload, contestant.function).saved_bytes()


def _turn(case: OpCase, workload: Workload, direction: str, contestant: OpContestant) -> _Turn:
    function = contestant.function
    assert function is not None
    if not case.has_gradient:
        own = {**workload.arguments(), **copies(workload.leaves)}
        return _Turn(contestant, lambda: lambda: function(**own))
    call = Call(workload, function)

    def prepare_backward() -> Run:
        outputs = call.forward()
        return lambda: call.backward(outputs)

    if direction == "forward":
        return _Turn(contestant, lambda: call.forward)
    if direction == "backward":
        return _Turn(contestant, prepare_backward)
    return _Turn(contestant, lambda: lambda: call.backward(call.forward()))
