"""Contestants that take a known time and return known values; named as factories by the tests."""

from __future__ import annotations

import sys
import time


class Sleeper:
    amount = 100.0
    flops = 2e9

    def __init__(self, *, seconds: float, value: float = 1.0, **_: object) -> None:
        self.seconds, self.value, self.held = seconds, value, b""
        print("libraries print what they like")

    def step(self) -> float:
        time.sleep(self.seconds)
        return self.value


class SlowSleeper(Sleeper):
    def __init__(self, *, seconds: float, **others: object) -> None:
        super().__init__(seconds=3 * seconds)


class Disagreeing(Sleeper):
    def step(self) -> float:
        return self.value * 1.01


class NotANumber(Sleeper):
    def step(self) -> float:
        return float("nan")


class Hungry(Sleeper):
    def step(self) -> float:
        self.held = bytes(range(256)) * 1_000_000
        return self.value


class Dying(Sleeper):
    def step(self) -> float:
        print("out of luck", file=sys.stderr, flush=True)
        raise SystemExit(9)
