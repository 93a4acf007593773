"""The two ceilings of a machine, measured in the run that they judge: copy bandwidth and the rate of a large GEMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_qwen.benchmark.clock import Clock, Run
from megatron_qwen.benchmark.timing import Summary, summarise

# Far beyond any cache, and large enough that launches do not show.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
GEMM_SIZE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """One of them.

    Attributes:
        name: what was run.
        unit: "B/s" (bytes read plus bytes written) or "FLOP/s".
        rate: by the quickest tenth: noise only ever slows a machine down.
        seconds: of one run.
    """

    name: str
    unit: str
    rate: float
    seconds: Summary


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The ceilings of one machine and dtype."""

    ceilings: tuple[Ceiling, ...]

    def rate(self, unit: str) -> float:
        """Return the highest ceiling of this unit."""
        return max(each.rate for each in self.ceilings if each.unit == unit)

    def fraction(self, bound: str, seconds: float, num_bytes: float, flops: float) -> float:
        """Return the part of its ceiling that a run reached.

        Args:
            bound: "memory" or "compute".
            seconds: of the run.
            num_bytes: that it must move.
            flops: that it must do.
        """
        if bound == "memory":
            return num_bytes / seconds / self.rate("B/s")
        return flops / seconds / self.rate("FLOP/s")


def measure_roofline(clock: Clock, dtype: torch.dtype, rounds: int) -> Roofline:
    """Return the copy ceilings (torch's copy and, where the extension has CUDA, its own) and the GEMM's.

    Args:
        clock: of the device.
        dtype: of the GEMM.
        rounds: measured runs of each.
    """
    device = clock.device
    num_bytes = COPY_BYTES[device.type]
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    found = [_ceiling("copy, torch", "B/s", 2 * num_bytes, clock, rounds, lambda: target.copy_(source))]
    own = _own_copy(target, source)
    if own is not None:
        found.append(_ceiling("copy, megatron_qwen", "B/s", 2 * num_bytes, clock, rounds, own))
    size = GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    name = f"GEMM {size} cubed, {str(dtype).removeprefix('torch.')}"
    found.append(_ceiling(name, "FLOP/s", 2 * size**3, clock, rounds, lambda: torch.mm(a, b.T, out=product)))
    return Roofline(ceilings=tuple(found))


def _ceiling(name: str, unit: str, amount: int, clock: Clock, rounds: int, run: Run) -> Ceiling:
    for _ in range(3):
        run()
    seconds = summarise([clock.time(lambda: run).seconds for _ in range(rounds)])
    return Ceiling(name=name, unit=unit, rate=amount / seconds.p10, seconds=seconds)


def _own_copy(target: torch.Tensor, source: torch.Tensor) -> Run | None:
    """Copy by the extension's kernel; None where it has none."""
    if not source.is_cuda:
        return None
    try:
        from megatron_qwen import _C
    except ImportError:
        return None
    if not _C.build_info()["cuda_compiled"]:
        return None

    def copy() -> None:
        stream = torch.cuda.current_stream(source.device).cuda_stream
        _C.copy_bandwidth(target.data_ptr(), source.data_ptr(), source.numel(), stream)

    return copy
