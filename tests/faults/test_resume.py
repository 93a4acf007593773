"""Faults 25 to 29: a run that was killed, resumed, resharded or tampered with goes on exactly, or says why not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest
from training_runs import (
    BATCH,
    EPOCH_END,
    STEPS,
    compare_steps,
    metrics,
    options,
    reshard,
    results,
    train,
    try_changes,
    write_data,
)

from megatron_qwen.data.tokenizer import QwenTokenizer
from megatron_qwen.errors import ConfigError, MismatchError, RankFailure
from megatron_qwen.testing.forked import run_forked

pytestmark = pytest.mark.multirank


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: ranks, parallel fields, model fields
    "tp2": (2, {"tp": 2, "sequence_parallel": True}, {}),
    "dp2": (2, {}, {}),
    "pp2": (2, {"pp": 2}, {}),
    "moe-ep2": (2, {"ep": 2}, {"source": "tiny-moe"}),
}


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of the whole run at a layout, run once per module."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("whole") / name
            ranks, _, _ = LAYOUTS[name]
            results(run_forked(train, ranks, values_of(name, data, done[name])))
        return done[name]

    return run


def values_of(name: str, data: Path, out: Path) -> dict[str, Any]:
    _, layout, model = LAYOUTS[name]
    values = options(data, out, **layout)
    values["model"].update(model)
    return values


def assert_equal_to_the_bit(out: Path, whole: Path) -> None:
    expected = metrics(whole)
    assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
    assert all(line["grad_norm"] > 0 for line in expected)
    assert metrics(out) == expected
    last = f"iter_{STEPS:07d}"
    assert results(run_forked(compare_steps, 1, out / last, whole / last)) == [[]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_run_killed_while_training_resumes_bit_for_bit(
    name: str, data: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """In bf16, with dropout, accumulation and clipping; killed after step 3, which is past the checkpoint of step 2."""
    values = values_of(name, data, tmp_path / "run")
    ranks, _, _ = LAYOUTS[name]
    killed = run_forked(train, ranks, values, None, 3)
    assert killed[0].status == -signal.SIGKILL
    assert killed[1].status == 1
    summary = results(run_forked(train, ranks, values))[0]
    assert summary["resumed_from"] == 2
    assert_equal_to_the_bit(tmp_path / "run", uninterrupted(name))


SAVE_POINTS = (
    "save.staged",
    "save.planned",
    "save.shards_written",
    "save.sharded",
    "save.hashed",
    "commit.synced",
    "commit.renamed",
    "save.committed",
    "save.tracked",
)
QUICK_POINTS = ("save.shards_written", "commit.renamed")


@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=() if point in QUICK_POINTS else pytest.mark.exhaustive) for point in SAVE_POINTS],
)
def test_run_killed_while_saving_resumes_bit_for_bit(
    point: str, data: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """Killed in the second save, that of step 4."""
    values = values_of("dp2", data, tmp_path / "run")
    # commit.* points are passed once more, by the hf/ folder at the start of the run.
    nth = 3 if point.startswith("commit.") else 2
    killed = run_forked(train, 2, values, f"{point}:{nth}:kill:0")
    assert killed[0].status == -signal.SIGKILL
    summary = results(run_forked(train, 2, values))[0]
    is_complete = point in ("commit.renamed", "save.committed", "save.tracked")
    assert summary["resumed_from"] == (4 if is_complete else 2)
    assert_equal_to_the_bit(tmp_path / "run", uninterrupted("dp2"))


def test_stopped_run_resumes_bit_for_bit_mid_epoch_and_at_epoch_end(
    data: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    values = values_of("dp2", data, tmp_path / "run")
    for stop, resumed_from in ((3, None), (EPOCH_END, 3), (None, EPOCH_END)):
        (summary, _) = results(run_forked(train_until, 2, values, stop))
        assert summary["resumed_from"] == resumed_from
    assert_equal_to_the_bit(tmp_path / "run", uninterrupted("dp2"))


def train_until(values: dict[str, Any], stop: int | None) -> Any:
    return train(values, stop_at=stop)


@pytest.mark.parametrize("damage", ["bit flip", "partial"])
def test_run_goes_on_from_the_newest_step_that_verifies(
    damage: str, data: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    whole, out = uninterrupted("dp2"), tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"iter_{STEPS:07d}")
    shard = out / "iter_0000004" / "__1_0.distcp"
    if damage == "partial":
        shard.unlink()
    else:
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 4
        shard.write_bytes(raw)
    (summary, _) = results(run_forked(train, 2, values_of("dp2", data, out)))
    assert summary["resumed_from"] == 2
    assert_equal_to_the_bit(out, whole)


def exact_values(
    data: Path, out: Path, model: Mapping[str, Any] = MappingProxyType({}), **layout: Any
) -> dict[str, Any]:
    """fp32 without dropout, so that layouts differ by rounding only."""
    values = options(data, out, **layout)
    values["model"].update(dtype="fp32", hidden_dropout=0.0, attention_dropout=0.0, **model)
    return values


def cut_back_to_step_2(whole: Path, out: Path) -> None:
    """Copy a run as it was when only its checkpoint of step 2 existed."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / f"iter_{STEPS:07d}")
    shutil.rmtree(out / "iter_0000004")


def assert_same_steps(out: Path, whole: Path) -> None:
    # Other samples would move these losses in the second digit.
    for found, expected in zip(metrics(out), metrics(whole), strict=True):
        assert found["tokens"] == expected["tokens"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_elastic_resume_on_one_rank_keeps_every_bit_of_the_state_and_the_data_order(
    name: str, data: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    _, layout, model = LAYOUTS[name]
    results(run_forked(train, 2, exact_values(data, whole, model, **layout)))
    cut_back_to_step_2(whole, out)
    original = whole / "iter_0000002"
    ((differing, summary, lines),) = results(run_forked(reshard, 1, exact_values(data, out, model), original))
    assert differing == []
    assert summary["resumed_from"] == 2
    changed = next(iter(layout), "dp")
    assert any(line.startswith(f"not bit-exact: layout.{changed}: saved 2, now 1") for line in lines), lines
    assert any("random streams" in line for line in lines), lines
    assert_same_steps(out, whole)


def test_elastic_resume_spreads_experts_over_more_ranks(data: Path, tmp_path: Path) -> None:
    """From one optimizer to two: Megatron gives the experts one of their own as soon as EP > 1."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    _, layout, model = LAYOUTS["moe-ep2"]
    results(run_forked(train, 1, exact_values(data, whole, model)))
    cut_back_to_step_2(whole, out)
    summaries = results(run_forked(train, 2, exact_values(data, out, model, **layout)))
    assert summaries[0]["resumed_from"] == 2
    assert_same_steps(out, whole)


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    results(run_forked(train_until, 1, options(data, out), 1))
    return out


def test_changed_run_is_refused_with_a_diff_unless_the_change_is_allowed(
    data: Path, stopped: Path, tmp_path: Path
) -> None:
    other = write_data(tmp_path / "other", seed=1)
    bigger = tmp_path / "tok"
    QwenTokenizer.train(["a b c d e f g " * 9], 285).save(bigger)
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 7},
        "data": {"data": {"blend": [[1.0, str(other / "corpus")]]}},
        "batch": {"schedule": {"global_batch_size": 2 * BATCH}},
        "tokenizer": {"data": {"tokenizer": str(bigger)}},
        "model": {"model": {"source": "tiny-moe"}},
        "optimizer": {"optimizer": {"lr": 0.5}},
        "schedule": {"schedule": {"steps": STEPS + 1}},
    }
    diffs = {
        "seed": "seed: saved 1234, now 7",
        "data": "data.blend[0][1].bin.sha256_of_head: saved ",
        "batch": f"batch.global_batch_size: saved {BATCH}, now {2 * BATCH}",
        "tokenizer": "tokenizer: saved ",
        "model": "model.config.model_type: saved 'qwen2', now 'qwen2_moe'",
        "optimizer": "optimizer.lr: saved ",
        "schedule": f"schedule.steps: saved {STEPS}, now {STEPS + 1}",
    }
    (raised,) = results(run_forked(try_changes, 1, options(data, stopped), changes))
    for part, diff in diffs.items():
        error = raised[part]
        assert isinstance(error, MismatchError), (part, error)
        assert diff in str(error), (part, str(error))
        assert "--allow-changed" in str(error)
        assert part in str(error).rsplit("--allow-changed", 1)[1]


def train_allowing(values: dict[str, Any], allowed: tuple[str, ...]) -> Any:
    return train(values, allow_changed=allowed, stop_at=2)


def test_allowed_change_is_accepted_and_a_misspelt_one_is_not(data: Path, stopped: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(stopped, tmp_path / "run"))
    changed = {**options(data, out), "seed": 7}
    with pytest.raises(ConfigError, match=r"--allow-changed sed: .* did you mean seed\?"):
        results(run_forked(train_allowing, 1, changed, ("sed",)))
    (summary,) = results(run_forked(train_allowing, 1, changed, ("seed",)))
    assert (summary["resumed_from"], summary["steps"]) == (1, 2)


def run_command(values: dict[str, Any], folder: Path, failpoint: str = "") -> subprocess.Popen[str]:
    """Start the command as a user would, on two ranks of its own."""
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps(values))
    environment = {**os.environ, "MEGATRON_QWEN_FAILPOINT": failpoint, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_qwen", "train", "pretrain", "--recipe", str(recipe), "--nproc", "2"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_whole_job(command: subprocess.Popen[str]) -> None:
    processes = [*psutil.Process(command.pid).children(recursive=True), psutil.Process(command.pid)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    command.communicate()


def test_command_killed_with_signal_9_resumes_bit_for_bit(
    data: Path, tmp_path: Path, uninterrupted: Callable[[str], Path]
) -> None:
    """First rank 1 dies in a save, then the whole job dies in training, then it runs to the end."""
    out = tmp_path / "run"
    values = values_of("dp2", data, out)

    first = run_command(values, tmp_path, "save.shards_written:1:kill:1")
    output, _ = first.communicate(timeout=200)
    assert first.returncode == RankFailure.exit_code, output
    assert "rank 1" in output
    assert not list(out.glob("iter_*[0-9]/manifest.json"))

    second = run_command(values, tmp_path)
    deadline = time.monotonic() + 200
    try:
        while not (out / "metrics.jsonl").exists() or len(metrics_so_far(out)) < 3:
            assert second.poll() is None, second.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        kill_whole_job(second)

    third = run_command(values, tmp_path)
    output, _ = third.communicate(timeout=200)
    assert third.returncode == 0, output
    assert "resumed from step" in output
    assert_equal_to_the_bit(out, uninterrupted("dp2"))


def metrics_so_far(out: Path) -> list[str]:
    """Complete lines; those of the first, killed run stay until the second has started."""
    lines = (out / "metrics.jsonl").read_text().split("\n")[:-1]
    return lines if (out / "iter_0000002").is_dir() else []
