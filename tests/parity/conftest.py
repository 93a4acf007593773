from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_qwen.parallel import groups
from megatron_qwen.parallel.layout import ParallelLayout


@pytest.fixture(scope="session", autouse=True)
def one_rank() -> Iterator[None]:
    groups.initialize(ParallelLayout())
    yield
    groups.shutdown()
