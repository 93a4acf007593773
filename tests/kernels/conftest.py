from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from emulated_extension import Emulation, build_emulated, emulated_cuda

from megatron_qwen.testing.interpreter import round_as_a_device_does


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Run a function of op_checks.py in a process whose Triton interprets kernels; an error comes back as it is.

    A process of its own, because Triton decides when it is imported, and megatron-core imports it.
    """
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed in this environment")
    previous = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = concurrent.futures.ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=round_as_a_device_does
        )
        pool.submit(os.getpid).result(timeout=120)
    finally:
        if previous is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = previous

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return pool.submit(function, *args, **kwargs).result(timeout=300)

    with pool:
        yield run


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """megatron_qwen._C with its CUDA kernels compiled for the CPU; built once for all workers of a run."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    base: Path = tmp_path_factory.getbasetemp()
    return build_emulated((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "emulated")


@pytest.fixture
def emulation(emulated_module: ModuleType) -> Iterator[Emulation]:
    """Backend "cuda" takes CPU tensors."""
    with emulated_cuda(emulated_module) as emulation:
        yield emulation
