"""Where the time of a training step goes: profiler events, attributed to kinds of operation.

A forward operation belongs to the range (`step_ranges.py`) that it runs in. A backward operation belongs to the range
of the forward operation that made its node: autograd numbers the nodes of a thread, and the profiler records the number
on both sides. Nothing is guessed from the names of kernels.

On a CPU a kind's time is wall time of the thread that steps: every instant belongs to exactly one range, so the kinds
and the unattributed rest add up to the step. On a GPU it is the time of the kernels that the kind's operations started;
there the rest is the time in which no kernel ran (or, below zero, how much they overlapped).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Names of the ranges that step_ranges.py opens start with this, and end with the kind.
PREFIX = "megatron_qwen/"
STEP = PREFIX + "step"
REST = "unattributed"
FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
# Kinds of what follows the backward pass.
UPDATE_KINDS = ("zero gradients", "gradient reduction", "gradient clipping", "optimizer", "report")
_ACCUMULATION = "gradient accumulation"
_COMMUNICATION = "communication"
_NODE = "autograd::engine::evaluate_function: "
_COLLECTIVES = ("c10d::", "gloo:", "nccl:")
# Our operations tell what they are wherever they are called from; beginnings of their names.
_OPERATIONS = {
    "megatron_qwen::qkv_rope": "rope, QKV split",
    "megatron_qwen::rope": "rope, QKV split",
    "megatron_qwen::rms_norm": "norm",
    "megatron_qwen::add_rms_norm": "norm",
    "megatron_qwen::swiglu": "swiglu",
    "megatron_qwen::linear_cross_entropy": "output GEMM + loss",
    "megatron_qwen::moe_routing": "router",
    "megatron_qwen::moe_permute": "dispatch",
    "megatron_qwen::moe_unpermute": "dispatch",
}


@dataclass(frozen=True, kw_only=True)
class Event:
    """One profiled call.

    Attributes:
        name: of the operation or range.
        start, end: seconds on the profiler's clock.
        thread: that ran it.
        sequence: number of the autograd node that it made, or (in backward) is; -1 for none.
        forward_thread: of a node in backward, the thread whose forward made it; 0 otherwise.
        device_seconds: of the kernels that it started itself, not through a call below it.
    """

    name: str
    start: float
    end: float
    thread: int
    sequence: int = -1
    forward_thread: int = 0
    device_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of operation: seconds of a step in forward, backward and update, and its floating-point operations."""

    kind: str
    forward: float
    backward: float
    update: float
    flops: float

    @property
    def seconds(self) -> float:
        """Of all three phases together."""
        return self.forward + self.backward + self.update


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The mean of some profiled steps.

    Attributes:
        clock: "host" (wall time of the stepping thread) or "device" (time of kernels).
        seconds: of a profiled step.
        steps: how many were profiled.
        plain_seconds: mean of as many steps right before, without the profiler.
        parts: the longest first; the last is the unattributed rest.
    """

    clock: str
    seconds: float
    steps: int
    plain_seconds: float
    parts: tuple[Part, ...]

    @property
    def overhead(self) -> float:
        """What profiling costs: how much longer a profiled step takes, as a fraction."""
        return self.seconds / self.plain_seconds - 1.0


def attribute(events: Iterable[Event], flops: Mapping[str, float], *, plain_seconds: float) -> Breakdown:
    """Sum the events inside the ranges called `STEP` by kind and phase.

    Args:
        events: of all threads, at least one of them a `STEP`.
        flops: floating-point operations of a step by kind, where they are counted.
        plain_seconds: see `Breakdown`.
    """
    ordered = sorted(events, key=lambda each: (each.start, -each.end))
    steps = [each for each in ordered if each.name == STEP]
    assert steps, "nothing was profiled: no range of the step"
    clock = "device" if any(each.device_seconds for each in ordered) else "host"
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event, kind, phase, self_seconds in _labelled(ordered):
        if not any(step.start <= event.start < step.end for step in steps):
            continue
        if clock == "device":
            spent[kind, phase] += event.device_seconds
        elif event.thread == steps[0].thread:
            spent[kind, phase] += self_seconds
    wall = sum(each.end - each.start for each in steps)
    if clock == "device":
        spent[REST, UPDATE] += wall - sum(spent.values())
    return Breakdown(
        clock=clock,
        seconds=wall / len(steps),
        steps=len(steps),
        plain_seconds=plain_seconds,
        parts=_parts(spent, len(steps), flops),
    )


def _parts(spent: Mapping[tuple[str, str], float], steps: int, flops: Mapping[str, float]) -> tuple[Part, ...]:
    parts = [
        Part(
            kind=kind,
            forward=spent.get((kind, FORWARD), 0.0) / steps,
            backward=spent.get((kind, BACKWARD), 0.0) / steps,
            update=spent.get((kind, UPDATE), 0.0) / steps,
            flops=sum(flops.get(each, 0.0) for each in {kind, *kind.split(" + ")}),
        )
        for kind in {kind for kind, _ in spent} | {REST}
    ]
    return tuple(sorted(parts, key=lambda part: (part.kind == REST, -part.seconds)))


def _labelled(ordered: Sequence[Event]) -> Iterator[tuple[Event, str, str, float]]:
    """Yield every event with its kind, its phase, and its seconds without those of the calls below it."""
    inner = _seconds_below(ordered)
    made: dict[tuple[int, int], str] = {}
    stacks: dict[int, list[tuple[Event, str, str]]] = defaultdict(list)
    for index, event in enumerate(ordered):
        stack = stacks[event.thread]
        while stack and stack[-1][0].end <= event.start:
            stack.pop()
        above = stack[-1][1:] if stack else (REST, FORWARD)
        kind, phase = _label(event, above, made)
        if event.sequence >= 0 and not event.forward_thread:
            # Of the calls that saw this number last is the one that made the node: it moves the counter on.
            made[event.thread, event.sequence] = kind
        stack.append((event, kind, phase))
        yield event, kind, phase, event.end - event.start - inner[index]


def _label(event: Event, above: tuple[str, str], made: Mapping[tuple[int, int], str]) -> tuple[str, str]:
    kind, phase = above
    name = event.name
    if name == STEP:
        return REST, FORWARD
    if name.startswith(PREFIX):
        kind = name.removeprefix(PREFIX)
        # A module that runs in backward is recomputed there.
        return kind, UPDATE if kind in UPDATE_KINDS else phase
    if name.startswith(_NODE):
        if "AccumulateGrad" in name:
            return _ACCUMULATION, BACKWARD
        return made.get((event.forward_thread, event.sequence), kind), BACKWARD
    if name.startswith(_COLLECTIVES):
        return _COMMUNICATION, phase
    ours = next((kind for start, kind in _OPERATIONS.items() if name.startswith(start)), kind)
    return ours, phase


def _seconds_below(ordered: Sequence[Event]) -> list[float]:
    """Return for each event the seconds of its direct children."""
    below = [0.0] * len(ordered)
    stacks: dict[int, list[int]] = defaultdict(list)
    for index, event in enumerate(ordered):
        stack = stacks[event.thread]
        while stack and ordered[stack[-1]].end <= event.start:
            stack.pop()
        if stack:
            # The profiler's clock ticks in nanoseconds: a child can seem to outlast its parent by one.
            below[stack[-1]] += min(event.end, ordered[stack[-1]].end) - event.start
        stack.append(index)
    return below


def record(run: Callable[[], Any], steps: int) -> list[Event]:
    """Call `run` once under the profiler to warm it up and `steps` times to record; each call is a `STEP`.

    The device is waited for at the end of every step.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    events: list[Any] = []
    for count in (1, steps):
        with profile(activities=activities) as profiler:
            for _ in range(count):
                with record_function(STEP):
                    run()
                    if on_cuda:
                        torch.cuda.synchronize()
        events = list(profiler.events())
    return [_event(each) for each in events if each.device_type.name == "CPU"]


def _event(event: Any) -> Event:
    return Event(
        name=event.name,
        start=event.time_range.start / 1e6,
        end=event.time_range.end / 1e6,
        thread=event.thread,
        sequence=event.sequence_nr,
        forward_thread=event.fwd_thread or 0,
        # A range appears once more among the device's events, under its own name, around the kernels in it.
        device_seconds=sum(kernel.duration for kernel in event.kernels if kernel.name != event.name) / 1e6,
    )
