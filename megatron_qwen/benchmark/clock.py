"""Seconds of one run on a device, with cold caches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

_MB = 2**20


@dataclass(frozen=True)
class Sample:
    """One run: its seconds, and whether they are the device's alone.

    `is_pure` is False where the device may have waited for the host within them: the host was still starting work,
    or the work itself asked the device for a result.
    """

    seconds: float
    is_pure: bool = True


Run = Callable[[], object]


class Clock(Protocol):
    """Times runs on `device`."""

    device: torch.device

    def time(self, prepare: Callable[[], Run]) -> Sample:
        """Prepare, empty the caches, run what `prepare` returned once to the end, and return the time of that."""
        ...

    def peak_bytes(self, run: Run) -> int:
        """Return by how much memory grew at its peak while it ran; 0 where that cannot be known."""
        ...


def clock_of(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


class CudaClock:
    """Events on the stream, around work that the host queued while the device was still busy writing over its cache.

    The L2 is left full of another buffer's dirty lines: a kernel then pays for every byte it writes, as in a training
    step, and not for those only that no longer fit. If the host needs longer to queue the work than the device to
    write, more is written, up to `_MOST_FILLS` times; what then still waits is reported as not pure.
    """

    _MOST_FILLS = 64

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * _MB))
        self._buffer = torch.empty(2 * cache, dtype=torch.uint8, device=device)
        self._fills = 4

    def time(self, prepare: Callable[[], Run]) -> Sample:
        """Prepare, empty the L2, run once, and return the time between the events around the run."""
        while True:
            sample = self._time(prepare())
            if sample.is_pure or self._fills >= self._MOST_FILLS:
                return sample
            self._fills *= 2

    def _time(self, run: Run) -> Sample:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for _ in range(self._fills):
            self._buffer.zero_()
        start.record()
        run()
        end.record()
        is_pure = not start.query()  # type: ignore[no-untyped-call]  # not even begun: all was queued in time
        end.synchronize()
        return Sample(start.elapsed_time(end) / 1e3, is_pure)

    def peak_bytes(self, run: Run) -> int:
        """Return by how much the allocator's memory grew at its peak."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device) - before)


class CpuClock:
    """The host's clock; between runs a buffer twice the last-level cache (at most 256 MiB) is written."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._buffer = torch.empty(min(2 * _last_level_cache(), 256 * _MB), dtype=torch.uint8)

    def time(self, prepare: Callable[[], Run]) -> Sample:
        """Prepare, write over the caches, run once, and return the time of the run."""
        run = prepare()
        self._buffer.zero_()
        begin = time.perf_counter()
        run()
        return Sample(time.perf_counter() - begin)

    def peak_bytes(self, run: Run) -> int:
        """Return by how much the resident set grew at its peak; 0 where Linux does not say."""
        status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if not status.exists() or not reset.exists():
            return 0
        try:
            reset.write_text("5")  # the peak starts anew from what is resident now
        except OSError:  # a container may forbid it
            return 0
        before = _status_bytes(status, "VmRSS")
        run()
        return max(0, _status_bytes(status, "VmHWM") - before)


def _status_bytes(status: Path, name: str) -> int:
    return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))


def _last_level_cache() -> int:
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes, default=32 * _MB)
