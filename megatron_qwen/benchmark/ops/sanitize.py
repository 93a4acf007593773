"""NVIDIA's compute-sanitizer over our kernels: stray accesses (memcheck), races in shared memory (racecheck)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from megatron_qwen.benchmark.ops.result import SanitizerRun

TOOLS = ("memcheck", "racecheck")
TIMEOUT = 120.0
"""Seconds that each tool gets unless more are given; under racecheck a family of many sizes takes more."""
# Another status than a crash's or a wrong result's.
_ERRORS = 86
_PROGRAM = "megatron_qwen.benchmark.ops.odd_sizes"


def sanitize(
    device: torch.device, backends: Sequence[str], names: Sequence[str], limit: float = TIMEOUT
) -> tuple[SanitizerRun, ...]:
    """Run the odd sizes of the named cases under each tool, in a process of its own.

    Args:
        device: "not applicable" unless it is a CUDA device.
        backends: of `contestants.OURS`; the reference is no kernel of ours.
        names: of cases.
        limit: seconds for each tool, after which it has failed.
    """
    return tuple(_run(tool, device, backends, names, limit) for tool in TOOLS)


def _run(tool: str, device: torch.device, backends: Sequence[str], names: Sequence[str], limit: float) -> SanitizerRun:
    program = find_sanitizer()
    if device.type != "cuda":
        return SanitizerRun(tool=tool, status="not applicable", detail=f"no CUDA device: the run is on {device.type}")
    if program is None:
        return SanitizerRun(tool=tool, status="not applicable", detail="compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", str(_ERRORS), "--print-limit", "20"]
    command += [sys.executable, "-m", _PROGRAM, str(device), ",".join(backends), *names]
    # torch's allocator hands out parts of larger blocks, in which a stray access stays unseen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return SanitizerRun(
            tool=tool, status="failed", detail=f"not done after {limit:g} s; --sanitize-limit gives more"
        )
    return judge_output(tool, result.returncode, result.stdout + result.stderr)


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer, from PATH or beside nvcc."""
    found = shutil.which("compute-sanitizer")
    if found is None and (nvcc := shutil.which("nvcc")):
        found = shutil.which("compute-sanitizer", path=os.path.dirname(os.path.realpath(nvcc)))  # noqa: PTH120
    return found


def judge_output(tool: str, status: int, output: str) -> SanitizerRun:
    """Return what a finished run means.

    Args:
        tool: of `TOOLS`.
        status: exit status of compute-sanitizer.
        output: all it printed.
    """
    summary = re.findall(r"========= ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    counted = re.search(r"SUMMARY: (\d+)", summary[-1]) if summary else None
    if status == 0 and counted is not None and int(counted[1]) == 0:
        return SanitizerRun(tool=tool, status="clean", detail=summary[-1])
    if counted is not None and int(counted[1]) > 0:
        first = next((line for line in output.splitlines() if re.match(r"=========\s+(Invalid|Error|Race)", line)), "")
        return SanitizerRun(tool=tool, status="errors", detail=f"{summary[-1]}; {first.lstrip('= ')}".rstrip("; "))
    if "Device not supported" in output:
        return SanitizerRun(tool=tool, status="not applicable", detail="compute-sanitizer does not support this device")
    return SanitizerRun(tool=tool, status="failed", detail=f"status {status}: {output.strip()[-400:]}")
