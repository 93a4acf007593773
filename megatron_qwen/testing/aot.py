"""What Triton's compiler makes of a launch, without a GPU.

Launch functions run as in production, with meta tensors of real sizes, in a process whose Triton believes in a device
of the wanted architecture and stops after compiling. So the specialisation that is examined (which arguments are
multiples of 16, which are 1, which need 64 bits) is the one that a training run gets. Needs Triton, not interpreted.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """One compiled kernel.

    Attributes:
        name: of the kernel.
        architecture: 80 or 90.
        registers: per thread.
        stack_bytes, local_bytes: per thread; spilled registers live there.
        shared_bytes: static shared memory.
        sass: the disassembly.
    """

    name: str
    architecture: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    sass: str

    def count(self, instruction: str) -> int:
        """Return how often `instruction`, a regular expression, stands in the code."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    @property
    def spills(self) -> int:
        """Instructions that touch local memory."""
        return self.count(r"(?:LDL|STL)(?:\.\w+)*")


class _CompileOnly:
    """What Triton asks of a driver before it launches."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch  # type: ignore[no-any-return]  # compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return device


def compile_launches(launch: Callable[[], None], architecture: int) -> list[MachineCode]:
    """Return the kernels that `launch` would start on a device of `architecture` (80, 90), in order.

    The process is changed for good: use one that does nothing else.
    """
    driver.set_active(_CompileOnly(architecture))
    compiled: list[Any] = []
    with _instead_of_launching(compiled):
        launch()
    return [
        _machine_code(kernel.metadata.name, kernel.metadata.shared, kernel.asm["cubin"], architecture)
        for kernel in compiled
    ]


@contextlib.contextmanager
def _instead_of_launching(compiled: list[Any]) -> Iterator[None]:
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


@functools.cache  # launches of many sizes share a kernel, and reading one takes longer than finding it
def _machine_code(name: str, dynamic_shared: int, cubin_bytes: bytes, architecture: int) -> MachineCode:
    path, tool = _tools()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(cubin_bytes)
        texts = [
            subprocess.run(
                [tool, option, str(cubin)], env={**os.environ, "PATH": path}, check=True, capture_output=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        ]
    usage = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", texts[0]))
    return MachineCode(
        name=name,
        architecture=architecture,
        registers=int(usage["REG"]),
        stack_bytes=int(usage["STACK"]),
        local_bytes=int(usage["LOCAL"]),
        shared_bytes=max(int(usage["SHARED"]), dynamic_shared),
        sass=texts[1],
    )


def _tools() -> tuple[str, str]:
    """Search path for cuobjdump and the nvdisasm it calls, and the first of the two: those that Triton brings."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    packaged = [str(Path(entry) / "nvidia/cu13/bin") for entry in sys.path if entry]
    path = os.pathsep.join([str(bundled), *packaged, os.environ["PATH"]])
    tool = shutil.which("cuobjdump", path=path)
    assert tool, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"
    return path, tool
