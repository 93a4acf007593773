"""Builds megatron_qwen._C with its CUDA kernels emulated on the CPU (csrc/tests/emulation), and puts it in place.

Inside `emulated_cuda` an operation on CPU tensors runs on backend "cuda": its Python launch, its binding, its launcher
and its kernel, with every access to memory checked against the tensors that were passed in.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_qwen.kernels import backends

ROOT = Path(__file__).resolve().parents[2]


def build_emulated(folder: Path) -> ModuleType:
    """Compile the module into `folder`, once for all workers of a test run, and load it."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DMEGATRON_QWEN_CUDA=off"]
        for command in (
            [*configure, f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", folder, "--target", "emulated"],
        ):
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
            assert result.returncode == 0, result.stdout + result.stderr
    (library,) = (folder / "emulated").glob("_C*.so")
    spec = importlib.util.spec_from_file_location("emulated._C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Emulation:
    """The emulated module, and the memory its kernels may touch: that of the tensors whose address was asked for."""

    def __init__(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        self._library = ctypes.CDLL(module.__file__)
        self._library.emulation_allow.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self._library.emulation_accesses.argtypes = [ctypes.c_uint64]
        self._library.emulation_accesses.restype = ctypes.c_uint64
        names = [name for name in dir(module) if not name.startswith("_")]
        self.module = SimpleNamespace(**{name: self._forgetting(getattr(module, name)) for name in names})
        self.calls: list[str] = []

    def allow(self, tensor: torch.Tensor) -> int:
        """Return the address of a tensor, and let the next call touch what lies between its first and last element."""
        address = int(_DATA_PTR(tensor))
        if tensor.numel():
            span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            self._library.emulation_allow(address, span * tensor.element_size())
        return address

    def accesses(self, num_bytes: int) -> int:
        """Return how many accesses of this size the last call made."""
        return int(self._library.emulation_accesses(num_bytes))

    def set_multiprocessors(self, count: int) -> None:
        """Let the imagined device have `count` multiprocessors; 2 at first."""
        self._library.emulation_set_multiprocessors(count)

    @contextlib.contextmanager
    def other_order(self) -> Iterator[None]:
        """Inside the block copies of TMA land at once, not as late as possible, and the last thread runs first."""
        self._library.emulation_set_other_order(ctypes.c_bool(True))
        try:
            yield
        finally:
            self._library.emulation_set_other_order(ctypes.c_bool(False))

    def _forgetting(self, function: Any) -> Any:
        """Wrap a function so that, once it returns, no memory is allowed any more; numbers stay as they are."""
        if not callable(function):
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(function.__name__)
            if function.__name__.endswith("_programs"):  # launches nothing: what was allowed is for the call to come
                return function(*args, **kwargs)
            self._library.emulation_clear_accesses()
            try:
                return function(*args, **kwargs)
            finally:
                self._library.emulation_forget_memory()

        return call


_DATA_PTR = torch.Tensor.data_ptr


@contextlib.contextmanager
def emulated_cuda(module: ModuleType) -> Iterator[Emulation]:
    """Let backend "cuda" take CPU tensors, on the emulated kernels."""
    emulation = Emulation(module)
    for op in (op for op, kernels in backends.OPERATIONS.items() if "cuda" in kernels):
        backends.launches(op, "cuda")
    # A launch may be spread over several modules, and that of rope is in qkv_rope.
    launches = [each for name, each in sys.modules.items() if name.startswith("megatron_qwen.kernels.")]
    backends._choose.cache_clear()
    with contextlib.ExitStack() as patches:
        for each in (each for each in launches if hasattr(each, "_C")):
            patches.enter_context(mock.patch.object(each, "_C", emulation.module))
        patches.enter_context(mock.patch.object(backends, "_cuda_obstacle", return_value=""))
        patches.enter_context(mock.patch.object(torch.Tensor, "data_ptr", lambda tensor: emulation.allow(tensor)))
        yield emulation
    backends._choose.cache_clear()
