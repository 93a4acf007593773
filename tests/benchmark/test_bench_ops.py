"""`megatron-qwen bench ops` on a CPU, through the command line."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from megatron_qwen.benchmark import clock, roofline
from megatron_qwen.benchmark.ops import norm_cases
from megatron_qwen.cli import bench_ops as bench_ops_module
from megatron_qwen.cli.app import build_app
from megatron_qwen.errors import (
    ConfigError,
    CorruptInputError,
    IncompleteInputError,
    MismatchError,
    NumericsError,
    StorageError,
)

Command = Callable[..., Result]
SMALL = ("--op", "rms_norm", "--model", "0.5b", "--seq-length", "9", "--rounds", "2")


@pytest.fixture
def bench_ops(monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command in this process, with ceilings and caches of test size."""
    monkeypatch.setitem(roofline.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(roofline.GEMM_SIZE, "cpu", 64)
    monkeypatch.setattr(clock, "_last_level_cache", lambda: 2**16)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(build_app(), ["bench", "ops", *arguments])

    return run


def rows_of(result: Result) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["contestant"], row["direction"]): row for row in json.loads(result.stdout)["rows"]}


def test_a_run_checks_times_and_writes_everything(tmp_path: Path) -> None:
    arguments = ["--op", "qkv_rope_packed,swiglu", "--model", "0.5b,7b", "--seq-length", "33", "--vs", "torch,liger,te",
                 "--rounds", "3", "--check", "--sanitize", "--out", str(tmp_path), "--json"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-m", "megatron_qwen", "bench", "ops", *arguments],
        capture_output=True, text=True, timeout=240, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "ops.json").read_text())
    copy = max(each["rate"] for each in report["roofline"]["ceilings"] if each["unit"] == "B/s")
    groups = {(row["case"], row["model"], row["direction"]) for row in report["rows"]}
    assert len(groups) == 2 * 2 * 2
    for row in report["rows"]:
        assert (row["sizes"]["tokens"], row["dtype"]) == (33, "fp32")
        if row["contestant"] in ("liger", "te"):
            assert row["status"] == "missing"
            assert row["detail"]
            assert row["seconds"] is None
            continue
        assert row["status"] == "timed"
        assert row["error"] <= row["error_bound"]
        assert row["seconds"]["count"] == 3
        assert row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert row["fraction"] == pytest.approx(row["num_bytes"] / row["seconds"]["median"] / copy)
        assert (row["spread"] > 0) == (row["contestant"] == "reference")
    assert {each["dtype"] for each in report["odd_checks"]} == {"bf16", "fp32", "fp16"}
    assert all(each["is_right"] for each in report["odd_checks"])
    assert [run["status"] for run in report["sanitizer"]] == ["not applicable"] * 2
    assert {bar["status"] for bar in report["bars"]} == {"not judged"}
    assert {"python", "torch"} <= report["versions"].keys()

    with (tmp_path / "ops.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == len(report["rows"])
    assert float(lines[0]["median_us"]) == pytest.approx(1e6 * report["rows"][0]["seconds"]["median"], abs=0.01)
    assert lines[0]["device"] == report["device"]
    assert lines[0]["commit"] == report["commit"]
    for name in ("roofline.png", "speedup.png"):
        picture = matplotlib.image.imread(tmp_path / name)
        assert min(picture.shape[:2]) > 100
        assert len({tuple(pixel) for pixel in picture[::4, ::4].reshape(-1, picture.shape[-1]).tolist()}) > 5
    summary = (tmp_path / "summary.md").read_text()
    assert "compute-sanitizer memcheck: not applicable" in summary
    assert "te is missing: not installed" in summary
    assert "| swiglu | 7b 33 x 18944 fp32 | forward | reference |" in summary


def test_loss_counts_operations_and_memory(bench_ops: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_qwen.benchmark.ops import loss_cases

    (case,) = loss_cases.CASES
    sizes = {"tokens": 512, "hidden": 32, "vocab": 10_007}  # logits of 20 MB
    monkeypatch.setattr(loss_cases, "CASES", (replace(case, sizes=lambda config, length: sizes),))
    result = bench_ops("--family", "loss", "--model", "0.5b", "--rounds", "1", "--vs", "torch", "--json")
    assert result.exit_code == 0, result.output
    rows = rows_of(result)
    assert set(rows) == {("reference", "both"), ("torch", "both")}
    ours, plain = rows["reference", "both"], rows["torch", "both"]
    assert (ours["bound"], ours["status"]) == ("compute", "timed")
    gemm = next(each["rate"] for each in json.loads(result.stdout)["roofline"]["ceilings"] if "GEMM" in each["name"])
    assert ours["fraction"] == pytest.approx(6 * 512 * 32 * 10_007 / ours["seconds"]["median"] / gemm)
    if plain["peak_bytes"]:  # where the system says
        assert ours["peak_bytes"] < plain["peak_bytes"]


def halfway(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Leaves the last token of its output unwritten."""
    exact = norm_cases._plain(x, weight)
    out = torch.empty_like(exact)
    out[:-1] = exact[:-1]
    return out + 0.0 * exact.sum()


def wrong_gradient(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    exact = norm_cases._plain(x, weight)
    return exact.detach() + 1.01 * (exact - exact.detach())


def dying(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("an illegal memory access")


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (halfway, "NaN or infinity in one of the two only"),
        (wrong_gradient, "d "),
        (dying, "RuntimeError: an illegal memory access"),
        (lambda x, weight: norm_cases._plain(x, weight).double(), "y is torch.float64 (9, 896), not torch.float32"),
    ],
)
def test_a_wrong_kernel_of_ours_gets_no_time_and_fails_the_run(
    bench_ops: Command, monkeypatch: pytest.MonkeyPatch, ours: Any, message: str
) -> None:
    monkeypatch.setattr(norm_cases, "CASES", (replace(norm_cases.CASES[0], ours=ours),))
    result = bench_ops(*SMALL, "--vs", "torch", "--json")
    assert result.exit_code == NumericsError.exit_code
    rows = rows_of(result)
    for direction in ("forward", "backward"):
        assert rows["reference", direction]["status"] == "wrong"
        assert rows["reference", direction]["seconds"] is None
        assert message in rows["reference", direction]["detail"]
        assert rows["torch", direction]["status"] == "timed"
    shown = bench_ops(*SMALL, "--vs", "torch")
    assert "WRONG rms_norm 9 tokens, 896 hidden reference" in shown.stdout


def test_a_wrong_peer_gets_no_time_but_is_not_our_fault(bench_ops: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(norm_cases.CASES[0], peers={"aten": lambda: lambda x, weight: 1.1 * norm_cases._plain(x, weight)})
    monkeypatch.setattr(norm_cases, "CASES", (case,))
    result = bench_ops(*SMALL, "--vs", "torch,aten", "--json")
    assert result.exit_code == 0, result.output
    rows = rows_of(result)
    assert rows["aten", "forward"]["status"] == "wrong"
    assert rows["reference", "forward"]["status"] == "timed"
    assert "aten WRONG" in bench_ops(*SMALL, "--vs", "aten").stdout


def test_a_peer_whose_import_fails_is_listed_with_the_reason(
    bench_ops: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(norm_cases, "CASES", (replace(norm_cases.CASES[0], peers={"aten": broken}),))
    row = rows_of(bench_ops(*SMALL, "--vs", "aten", "--json"))["aten", "forward"]
    assert (row["status"], row["detail"]) == (
        "missing",
        "ImportError: libcudart.so.13: cannot open shared object file",
    )


def test_two_runs_are_compared_row_by_row(bench_ops: Command, tmp_path: Path) -> None:
    assert bench_ops(*SMALL, "--vs", "torch", "--out", str(tmp_path)).exit_code == 0
    now = tmp_path / "ops.json"
    content = json.loads(now.read_text())

    def reference(change: Callable[[dict[str, Any]], None]) -> str:
        altered = json.loads(json.dumps(content))
        change(altered)
        (tmp_path / "reference.json").write_text(json.dumps(altered))
        return str(tmp_path / "reference.json")

    def compare(change: Callable[[dict[str, Any]], None], *more: str) -> Result:
        return bench_ops("--results", str(now), "--compare", reference(change), *more)

    def quicker(altered: dict[str, Any], contestant: str = "reference") -> None:
        row = next(each for each in altered["rows"] if each["contestant"] == contestant)
        row["seconds"]["median"] /= 1.2

    same = compare(lambda altered: None)
    assert same.exit_code == 0, same.output
    assert "REGRESSION" not in same.stdout
    slower = compare(quicker)
    assert slower.exit_code == 1
    assert slower.stdout.count("REGRESSION") == 1
    assert "+20.0%" in slower.stdout
    assert "1 of 4 rows regressed" in slower.stdout
    assert compare(quicker, "--threshold", "25%").exit_code == 0
    assert compare(quicker, "--threshold", "0.19").exit_code == 1
    assert compare(lambda altered: quicker(altered, "torch")).exit_code == 0  # not ours
    assert "1 rows are in this run only" in compare(lambda altered: altered["rows"].pop()).stdout

    failures = [
        (lambda altered: altered.update(device="NVIDIA H200"), MismatchError, "taken on 'NVIDIA H200', this run on"),
        (lambda altered: [row["sizes"].update(tokens=5) for row in altered["rows"]], MismatchError, "5 tokens, 896"),
        (lambda altered: altered["rows"][0].update(status="quick"), CorruptInputError, "no report of bench ops"),
        (lambda altered: altered.pop("rows"), CorruptInputError, "no report of bench ops"),
    ]
    for change, kind, message in failures:
        result = compare(change)
        assert isinstance(result.exception, kind)
        assert message in str(result.exception)


def test_a_kernel_that_became_wrong_is_a_regression(
    bench_ops: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench_ops(*SMALL, "--vs", "none", "--out", str(tmp_path))
    assert {each.name for each in tmp_path.iterdir()} == {"ops.json", "ops.csv", "summary.md", "roofline.png"}
    monkeypatch.setattr(norm_cases, "CASES", (replace(norm_cases.CASES[0], ours=halfway),))
    result = bench_ops(*SMALL, "--vs", "none", "--compare", str(tmp_path / "ops.json"))
    assert result.exit_code == NumericsError.exit_code
    assert "2 of 2 rows regressed" in result.stdout


def test_what_the_time_limit_leaves_out_is_listed(bench_ops: Command) -> None:
    result = bench_ops(*SMALL, "--dtype", "fp32,bf16", "--vs", "none", "--time-limit", "0.000001", "--json")
    report = json.loads(result.stdout)
    assert report["rows"] == []
    assert report["not_reached"] == [f"rms_norm 0.5b (9 tokens, 896 hidden) {dtype}" for dtype in ("fp32", "bf16")]


def test_without_rounds_odd_sizes_are_checked_and_nothing_is_measured(bench_ops: Command) -> None:
    result = bench_ops("--op", "swiglu", "--rounds", "0", "--check", "--sanitize", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert len(report["odd_checks"]) == 7
    assert len(report["sanitizer"]) == 2
    assert report["rows"] == report["bars"] == []
    assert report["roofline"] is None


def test_peers_that_no_chosen_operation_has_are_not_asked() -> None:
    def peers(op: str, versus: str) -> tuple[str, ...]:
        return bench_ops_module._bench("", op, "", "", "", "", versus, None, torch.device("cpu")).versus

    assert peers("rms_norm", "") == ("torch", "compile", "aten", "liger", "te")
    assert peers("rms_norm", "fa3") == ("fa3",)


def test_the_list_names_every_operation_with_its_kernels_and_peers(bench_ops: Command) -> None:
    rows = {row["op"]: row for row in json.loads(bench_ops("--list", "--json").stdout)}
    assert {"qkv_rope", "rms_norm", "add_rms_norm", "swiglu", "linear_cross_entropy"} <= set(rows)
    assert rows["swiglu"]["directions"] == ["forward", "backward"]
    assert {"reference", "triton"} <= set(rows["swiglu"]["backends"])
    assert {"torch", "compile", "liger"} <= set(rows["swiglu"]["peers"])
    assert "torch" not in rows["dca_prefill"]["peers"]
    assert "compile" not in rows["moe_mlp"]["peers"]
    assert "add_rms_norm" in bench_ops("--list").stdout


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("--op", "rms_nrom"), ConfigError, "Did you mean 'rms_norm'?"),
        (("--family", "convolution"), ConfigError, "expected one of rope, norm, swiglu, loss, moe"),
        (("--model", "8b"), ConfigError, "no preset '8b'"),
        (("--family", "moe", "--model", "7b"), ConfigError, "no layer of moe_permute, moe_unpermute"),
        (("--seq-length", "1k"), ConfigError, "expected whole numbers"),
        (("--seq-length", "1"), ConfigError, "expected at least 2"),
        (("--dtype", "fp8"), ConfigError, "expected one of fp32, bf16, fp16"),
        (("--backend", "cudnn"), ConfigError, "expected one of cuda, triton, reference"),
        (("--backend", "cuda", *SMALL), ConfigError, "the tensors are on cpu, not on a CUDA device"),
        (("--vs", "apex"), ConfigError, "expected one of torch, compile, aten, grouped_mm, liger, te"),
        (("--rounds", "-1"), ConfigError, "expected at least 1"),
        (("--rounds", "0"), ConfigError, "measures nothing; add --check or --sanitize"),
        (("--sanitize-limit", "0"), ConfigError, "--sanitize-limit: got 0"),
        (("--time-limit", "-1"), ConfigError, "--time-limit: got -1"),
        (("--op", "swiglu", "--out", "/dev/null/here"), StorageError, "cannot create /dev/null/here"),
        (("--threshold", "much"), ConfigError, "expected a percentage like 5%"),
        (("--device", "tpu"), ConfigError, "expected cpu or cuda"),
        (("--interpreter", "--device", "cuda"), ConfigError, "--interpreter runs on the CPU"),
        (("--results", "nowhere.json"), IncompleteInputError, "no such file"),
        (("--compare", "nowhere.json"), IncompleteInputError, "no such file"),
    ],
)
def test_bad_options_are_named(bench_ops: Command, arguments: tuple[str, ...], kind: type, message: str) -> None:
    result = bench_ops(*arguments)
    assert isinstance(result.exception, kind), result.output
    assert message in str(result.exception)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_are_checked_through_the_interpreter(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-m", "megatron_qwen", "bench", "ops", "--interpreter", "--op", "add_rms_norm",
         "--model", "0.5b", "--seq-length", "5", "--dtype", "bf16", "--json"],
        capture_output=True, text=True, timeout=240, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {each["contestant"] for each in report["odd_checks"]} == {"triton"}
    (row,) = report["rows"]
    assert (row["contestant"], row["status"], row["seconds"]) == ("triton", "right", None)
    assert report["roofline"] is None
