"""Steps the contestants of a case in turn, and boils their times down to figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_qwen.benchmark.worker import Step, Worker
from megatron_qwen.errors import MismatchError


@dataclass(frozen=True)
class Summary:
    """Seconds per step: median and the 10th and 90th percentile of `count` steps."""

    median: float
    p10: float
    p90: float
    count: int


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Return the value below which `fraction` of the samples lie, interpolating linearly between them.

    Args:
        samples: at least one number, in any order.
        fraction: between 0 and 1.
    """
    assert samples
    assert 0 <= fraction <= 1, fraction
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summarise(seconds: Sequence[float]) -> Summary:
    """Return median and spread of the samples."""
    return Summary(percentile(seconds, 0.5), percentile(seconds, 0.1), percentile(seconds, 0.9), len(seconds))


def step_in_turn(
    workers: Sequence[Worker], *, warmup: int, rounds: int, on_round: Callable[[int], None] | None = None
) -> list[list[Step]]:
    """Step every worker once per round, A B A B ..., so that all meet the same weather on the machine.

    Args:
        workers: contestants, in the order they step.
        warmup: rounds before the first that counts.
        rounds: rounds that count, at least 1.
        on_round: called with the number of rounds done, warm-up included.

    Returns:
        Per worker its counted steps.
    """
    steps: list[list[Step]] = [[] for _ in workers]
    for turn in range(warmup + rounds):
        for worker, mine in zip(workers, steps, strict=True):
            step = worker.step()
            if turn >= warmup:
                mine.append(step)
        if on_round is not None:
            on_round(turn + 1)
    return steps


# Training amplifies rounding: with 16 experts in fp32, two threads, two runs of transformers itself differed by 3e-5
# at the sixth step and by 9e-5 at the thirteenth (its sums over tokens are not ordered).
COMPARED_STEPS = 5


def check_agreement(names: Sequence[str], values: Sequence[Sequence[float]], tolerance: float) -> float:
    """Refuse to compare the speed of contestants that do not compute the same.

    Args:
        names: the contestants.
        values: per contestant one check value (a loss) per step; the first `COMPARED_STEPS` are compared.
        tolerance: largest relative difference from the first contestant.

    Returns:
        The largest relative difference found.

    Raises:
        MismatchError: a value differs by more, or is not finite.
    """
    worst = 0.0
    for name, mine in zip(names, values, strict=True):
        pairs = zip(values[0][:COMPARED_STEPS], mine[:COMPARED_STEPS], strict=True)
        for step, (reference, value) in enumerate(pairs):
            difference = abs(value - reference) / max(abs(reference), 1e-30)
            if not difference <= tolerance:
                raise MismatchError(
                    f"step {step}: {name} computed {value!r}, {names[0]} {reference!r}; expected equal to "
                    f"{tolerance:g} relative. They do not do the same work, so their speed is not compared."
                )
            worst = max(worst, difference)
    return worst
