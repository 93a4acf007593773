"""The numbered examples run in their order, each on what the one before left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_example(name: str, *arguments: str) -> str:
    path = ROOT / "examples" / name
    command = [sys.executable, str(path)] if name.endswith(".py") else ["bash", str(path)]
    # The scripts call `python` and `megatron-qwen`: those of the interpreter that runs the tests.
    path_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path_first, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{name} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.multirank
def test_the_numbered_examples_run_one_after_the_other(tmp_path):
    out = str(tmp_path / "out")
    run_example("01_text_to_tokens.sh", out)
    assert (tmp_path / "out" / "data" / "text.idx").stat().st_size > 0

    run_example("02_pretrain_dense.sh", out)
    tracker = tmp_path / "out" / "dense" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "6"

    assert "loss" in run_example("03_pretrain_moe.py", out)
    run_example("04_huggingface_round_trip.sh", out)
    run_example("05_generate.sh", out)


def test_the_layer_spec_example_runs():
    assert "(2, 16, 512)" in run_example("06_layer_spec_in_your_own_megatron.py")


def test_every_numbered_example_is_run_here():
    numbered = {path.name for path in (ROOT / "examples").glob("[0-9]*")}
    source = Path(__file__).read_text(encoding="utf-8")
    assert numbered
    assert {name for name in numbered if name not in source} == set()
