"""The switchboard of the crash tests itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from megatron_qwen.errors import ConfigError
from megatron_qwen.testing import failpoints

JOB = """
from megatron_qwen.testing import failpoints
failpoints.register("one", "first")
failpoints.register("two", "second")
for _ in range(3):
    for name in ("one", "two"):
        try:
            failpoints.hit(name)
        except (failpoints.FailPointError, OSError) as error:
            print(name, type(error).__name__, getattr(error, "errno", None))
"""


def run_job(armed: str, rank: str = "0") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MEGATRON_QWEN_FAILPOINT": armed, "RANK": rank}
    return subprocess.run([sys.executable, "-c", JOB], env=environment, capture_output=True, text=True, timeout=60)


def test_only_the_armed_point_acts_and_only_the_nth_time() -> None:
    assert run_job("").stdout == ""
    assert run_job("two:2:raise").stdout == "two FailPointError None\n"
    assert run_job("one:3:enospc").stdout == "one OSError 28\n"
    assert run_job("one:4:raise").stdout == ""
    assert run_job("one:1:kill").returncode == -9


def test_a_rank_can_be_named() -> None:
    assert run_job("one:1:raise:1", rank="1").stdout != ""
    assert run_job("one:1:raise:1", rank="0").stdout == ""


@pytest.mark.parametrize("text", ["one", "one:1", "one:0:kill", "one:x:kill", "one:1:explode", "one:1:kill:0:1"])
def test_misspelt_variable_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected name:nth:action"):
        failpoints.arm(text)
