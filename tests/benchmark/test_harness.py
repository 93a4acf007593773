from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from megatron_qwen.benchmark.registry import CASES, Case, Contestant, choose, find_case
from megatron_qwen.benchmark.report import table, write_report
from megatron_qwen.benchmark.run import run_case
from megatron_qwen.benchmark.timing import percentile, summarise
from megatron_qwen.benchmark.worker import Worker
from megatron_qwen.errors import ConfigError, MismatchError, RankFailure

SETTING = {"model": "toy", "dtype": "fp32"}


@pytest.fixture(autouse=True)
def _contestants_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def toy(*names: str, ceiling: str | None = None) -> Case:
    contestants = [Contestant(name=name, factory=f"toy_contestants:{name}") for name in names]
    if ceiling:
        contestants.append(Contestant(name="ceiling", factory=f"toy_contestants:{ceiling}", is_ceiling=True))
    return Case(name="toy", unit="tokens", contestants=tuple(contestants), tolerance={"fp32": 1e-4})


def test_percentiles_interpolate() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], f) for f in (0, 0.5, 0.9, 1)] == pytest.approx([1, 2.5, 3.7, 4])
    assert percentile([7.0], 0.9) == 7
    assert summarise([3.0, 1.0, 2.0]).median == 2


def test_contestants_step_in_turn_and_the_report_says_how_much_faster_we_are() -> None:
    rounds: list[int] = []
    report = run_case(
        toy("Sleeper", "SlowSleeper", ceiling="Sleeper"),
        {"seconds": 0.02},
        SETTING,
        versus=("SlowSleeper",),
        threads=1,
        warmup=1,
        rounds=4,
        on_round=rounds.append,
    )
    ours, theirs, ceiling = report.rows
    assert rounds == [1, 2, 3, 4, 5]
    assert (ours.seconds.count, ours.ratio) == (4, 1)
    assert 0.02 <= ours.seconds.p10 <= ours.seconds.median <= ours.seconds.p90
    assert theirs.ratio == pytest.approx(1 / 3, rel=0.25)
    assert theirs.amount_per_second == pytest.approx(100 / 0.06, rel=0.25)
    assert ours.utilisation == pytest.approx(1, rel=0.25)
    assert ceiling.amount_per_second == 0
    assert ours.versions["python"]


def test_peak_memory_is_each_contestants_own() -> None:
    report = run_case(toy("Sleeper", "Hungry"), {"seconds": 0}, SETTING, versus=("Hungry",), warmup=0, rounds=1)
    assert report.rows[1].peak_bytes - report.rows[0].peak_bytes > 200e6


@pytest.mark.parametrize("other", ["Disagreeing", "NotANumber"])
def test_contestants_that_compute_something_else_are_not_compared(other: str) -> None:
    with pytest.raises(MismatchError, match=f"step 0: {other} computed .* Sleeper 1.0"):
        run_case(toy("Sleeper", other), {"seconds": 0}, SETTING, versus=(other,), warmup=0, rounds=1)


def test_a_contestant_that_dies_is_named_with_its_last_words() -> None:
    with pytest.raises(RankFailure, match=r"contestant Dying ended with status 9:\n(.|\n)*out of luck"):
        run_case(toy("Sleeper", "Dying"), {"seconds": 0}, SETTING, versus=("Dying",), warmup=0, rounds=1)


def test_a_contestant_that_cannot_be_built_is_named() -> None:
    with pytest.raises(RankFailure, match="contestant odd ended with status 1"), Worker("odd", "no_such_module:F", {}):
        pass


def test_no_process_outlives_a_failed_run() -> None:
    worker = Worker("a", "toy_contestants:Sleeper", {"seconds": 60})
    with pytest.raises(RuntimeError, match="stop"), worker:
        raise RuntimeError("stop")
    assert worker._process.returncode is not None


def test_report_files_hold_device_versions_and_every_run(tmp_path: Path) -> None:
    report = run_case(toy("Sleeper", "SlowSleeper"), {"seconds": 0.001}, SETTING, versus=("SlowSleeper",), rounds=1)
    write_report(report, tmp_path)
    files = write_report(report, tmp_path)
    assert [file.name for file in files] == ["toy.json", "toy.csv", "toy.png"]
    content = json.loads(files[0].read_text())
    assert content["device"]
    assert content["rows"][1]["seconds"]["median"] == report.rows[1].seconds.median
    with files[1].open() as stream:
        lines = list(csv.DictReader(stream))
    assert [line["contestant"] for line in lines] == ["Sleeper", "SlowSleeper"] * 2
    assert files[2].read_bytes().startswith(b"\x89PNG")
    assert table(report).row_count == 2


def test_every_registered_factory_exists() -> None:
    for case in CASES:
        assert not case.contestants[0].is_ceiling, case.name
        for contestant in case.contestants:
            module, _, name = contestant.factory.partition(":")
            assert hasattr(__import__(module, fromlist=[name]), name), contestant.factory


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        find_case("trian")
    with pytest.raises(ConfigError, match=r"--vs 'gemm': case 'train' has \[.*'transformers'"):
        choose(find_case("train"), ("gemm",))


def test_zero_rounds_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        run_case(toy("Sleeper"), {"seconds": 0}, SETTING, rounds=0)
