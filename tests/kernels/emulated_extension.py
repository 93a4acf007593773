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

import megatron_qwen
from megatron_qwen import ops
from megatron_qwen.kernels import backends, extension

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
    """The emulated module and the memory its kernels may touch: that of the tensors whose address was asked for."""

    def __init__(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        self._library = ctypes.CDLL(module.__file__)
        self._library.emulation_allow.argtypes = [ctypes.c_uint64, ctypes.c_uint64]
        self._library.emulation_accesses.argtypes = [ctypes.c_uint64]
        self._library.emulation_accesses.restype = ctypes.c_uint64
        names = [name for name in dir(module) if not name.startswith("_")]
        self.module = SimpleNamespace(**{name: self._forgetting(getattr(module, name)) for name in names})
        self.calls: list[str] = []

    def address(self, tensor: torch.Tensor | None) -> int:
        """Stand in for `extension.address`."""
        if tensor is None:
            return 0
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self._library.emulation_allow(tensor.data_ptr(), span * tensor.element_size() if tensor.numel() else 0)
        return tensor.data_ptr()

    def accesses(self, num_bytes: int) -> int:
        """Accesses of this size that the last call made."""
        return int(self._library.emulation_accesses(num_bytes))

    def set_multiprocessors(self, count: int) -> None:
        """As many as the imagined device has; 2 at first."""
        self._library.emulation_set_multiprocessors(count)

    def _forgetting(self, function: Any) -> Any:
        """The function; after a call no memory is allowed any more, but accesses are kept until the next."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(function.__name__)
            self._library.emulation_clear_accesses()
            try:
                return function(*args, **kwargs)
            finally:
                self._library.emulation_forget_memory()

        return call


@contextlib.contextmanager
def emulated_cuda(module: ModuleType) -> Iterator[Emulation]:
    """Run operations on CPU tensors on the emulated CUDA kernels; `backend="cuda"` works inside."""
    emulation = Emulation(module)
    backends._choose.cache_clear()
    with (
        mock.patch.object(megatron_qwen, "_C", emulation.module, create=True),
        mock.patch.object(backends, "_cuda_obstacle", lambda device: ""),
        mock.patch.object(extension, "address", emulation.address),
        mock.patch.object(extension, "stream", lambda device: contextlib.nullcontext(0)),
        ops.use_backend("cuda"),
    ):
        yield emulation
    backends._choose.cache_clear()
