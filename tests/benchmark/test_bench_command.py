from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_qwen.data.tokenizer import QwenTokenizer


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "megatron_qwen", "bench", *arguments],
        capture_output=True, text=True, timeout=240, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("model", "dtype"), [("tiny", "fp32"), ("tiny-moe", "bf16")])
def test_our_training_step_computes_what_transformers_computes_and_both_are_timed(
    tmp_path: Path, model: str, dtype: str
) -> None:
    # The run itself fails with MismatchError where a loss differs: five steps with clipping and AdamW in between.
    result = run("train", "--model", model, "--dtype", dtype, "--seq-length", "33", "--micro-batch-size", "3",
                 "--layers", "2", "--steps", "3", "--warmup", "2", "--threads", "1", "--vs", "transformers",
                 "--json", "--out", str(tmp_path))  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    ours, theirs, gemm = report["rows"]
    assert [row["contestant"] for row in report["rows"]] == ["megatron_qwen", "transformers", "gemm"]
    assert ours["setting"]["layers"] == 2
    assert theirs["ratio"] == pytest.approx(ours["seconds"]["median"] / theirs["seconds"]["median"])
    assert ours["amount_per_second"] * ours["seconds"]["median"] == pytest.approx(99)
    assert 0 < ours["utilisation"] < gemm["utilisation"] <= 1
    assert report["ceiling"].startswith("GEMM measured in this run")
    assert "megatron-core" in ours["versions"]
    assert "transformers" in theirs["versions"]
    assert "transformers" not in ours["versions"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("train.json", "train.csv", "train.png"), *("train-breakdown.csv", "train-breakdown.png")
    }  # fmt: skip
    check_breakdown(report["breakdown"], ours["flops_per_second"] * ours["seconds"]["median"], is_moe="moe" in model)


def check_breakdown(breakdown: dict[str, Any], flops: float, *, is_moe: bool) -> None:
    parts = {part["kind"]: part for part in breakdown["parts"]}
    mlp = {"router", "experts + shared expert"} if is_moe else {"fc1 GEMM", "fc2 GEMM", "swiglu"}
    twice = {"embedding", "norm", "qkv GEMM", "rope, QKV split", "attention", "proj GEMM", *mlp}
    assert twice <= set(parts)
    for kind in twice:
        assert min(parts[kind]["forward"], parts[kind]["backward"]) > 0, kind
    for kind in ("zero gradients", "gradient reduction", "gradient clipping", "optimizer"):
        assert parts[kind]["update"] > 0, kind
        assert parts[kind]["forward"] == parts[kind]["backward"] == 0, kind
    total = sum(part[phase] for part in parts.values() for phase in ("forward", "backward", "update"))
    assert total == pytest.approx(breakdown["seconds"], rel=1e-6)
    # Of a model this small most is Python; at hidden 512 it is half a percent.
    assert sum(parts["unattributed"][phase] for phase in ("forward", "backward", "update")) < 0.25 * total
    assert sum(part["flops"] for part in parts.values()) == pytest.approx(flops)


def test_data_prepare_is_timed_against_the_bare_tokenizer(tmp_path: Path) -> None:
    text = Path(__file__).read_text()
    QwenTokenizer.train([text] * 2, 300).save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(text * 20)
    result = run("data", str(tmp_path / "text.txt"), "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "1",
                 "--steps", "1", "--json")  # fmt: skip
    assert result.returncode == 0, result.stderr
    ours, bare = json.loads(result.stdout)["rows"]
    assert (ours["contestant"], bare["contestant"]) == ("megatron_qwen", "tokenizers")
    assert ours["amount_per_second"] * ours["seconds"]["median"] == pytest.approx(
        bare["amount_per_second"] * bare["seconds"]["median"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "qwen2.5-0.5"], "qwen2.5-0.5b"),
        (["--model", "tiny", "--seq-length", "5000"], "tiny has 256 positions"),
        (["--model", "tiny", "--seq-length", "8", "--layers", "9"], "tiny has 4, expected 1 to that"),
        (["--model", "tiny", "--seq-length", "8", "--vs", "nobody"], "--vs 'nobody'"),
        (["--dtype", "fp8"], "--dtype: got 'fp8'"),
        (["--threads", "0"], "--threads: got 0"),
        (["--model", "72B", "--seq-length", "8"], "72,706,203,648 parameters in fp32 need about 1,"),
        (["--model", "tiny", "--seq-length", "8", "--steps", "0"], "at least 1"),
    ],
)
def test_bad_requests_are_refused(arguments: list[str], message: str) -> None:
    result = run("train", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_moe_layers_of_four_libraries_agree_and_are_timed(tmp_path: Path) -> None:
    # The run itself fails with MismatchError where output or gradients differ.
    result = run("moe", "--experts", "6", "--topk", "3", "--hidden", "24", "--ffn", "8", "--shared-ffn", "40",
                 "--tokens", "37", "--steps", "2", "--warmup", "1", "--threads", "1",
                 "--json", "--out", str(tmp_path))  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    names = ["megatron_qwen", "megatron-core", "transformers", "transformers-loop"]
    assert [row["contestant"] for row in report["rows"]] == names
    ours = report["rows"][0]
    assert ours["amount_per_second"] * ours["seconds"]["median"] == pytest.approx(37)
    assert ours["flops_per_second"] * ours["seconds"]["median"] == pytest.approx(6 * 37 * 24 * (3 * (24 + 40) + 7))
    assert all(row["ratio"] > 0 for row in report["rows"])
    assert {path.name for path in tmp_path.iterdir()} == {"moe.json", "moe.csv", "moe.png"}


def test_moe_says_what_is_wrong() -> None:
    result = run("moe", "--experts", "2", "--topk", "3")
    assert result.returncode != 0
    assert "--topk: got 3" in result.stderr
