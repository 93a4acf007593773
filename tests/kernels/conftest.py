from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

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
